"""The section `activation_checkpointing`."""

from __future__ import annotations

from pydantic import Field

from ds_engine.config.support.section import Positive, Section


class ActivationCheckpointingConfig(Section):
    """Where the inputs of recomputed layers are stored between forward and backward."""

    partition_activations: bool = Field(
        default=False,
        description="Divides each saved activation among the model-parallel ranks, which gather it for "
        "backward.",
    )
    cpu_checkpointing: bool = Field(
        default=False, description="Keeps saved activations in host memory until backward."
    )
    contiguous_memory_optimization: bool = Field(
        default=False, description="Copies saved activations into one buffer that is allocated once."
    )
    number_checkpoints: Positive | None = Field(
        default=None,
        description="Number of activations that the buffer of contiguous_memory_optimization holds. "
        "Default: counted in the first step.",
    )
    keep_outputs: list[str] = Field(
        default=[],
        description='Operators whose outputs are kept instead of being computed again: "matmuls", "attention", or '
        'names such as "aten::mm".',
    )
    synchronize_checkpoint_boundary: bool = Field(
        default=False,
        description="Waits for the accelerator at the start and the end of each recomputed function.",
    )
    profile: bool = Field(
        default=False, description="Measures the time of forward and backward of each recomputed function."
    )
