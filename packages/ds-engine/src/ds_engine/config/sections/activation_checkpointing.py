"""The section `activation_checkpointing`."""

from __future__ import annotations

from pydantic import Field

from ds_engine.config.support.section import Positive, Section


class ActivationCheckpointingConfig(Section):
    """How activations rest between forward and backward in functions that recompute."""

    partition_activations: bool = Field(default=False, description="Divide them among model-parallel ranks.")
    cpu_checkpointing: bool = Field(default=False, description="Move them to host memory.")
    contiguous_memory_optimization: bool = Field(default=False, description="Copy them into one buffer.")
    number_checkpoints: Positive | None = Field(
        default=None, description="How many there are, for contiguous_memory_optimization."
    )
    synchronize_checkpoint_boundary: bool = Field(
        default=False, description="Wait for the accelerator at every recomputed function."
    )
    profile: bool = Field(default=False, description="Time forward and backward of recomputed functions.")
