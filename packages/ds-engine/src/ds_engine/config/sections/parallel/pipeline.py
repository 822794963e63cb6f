"""The section `pipeline`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_engine.config.support.section import Count, Positive, Section


class PipelineConfig(Section):
    """Pipeline parallelism: the layers of a model are divided into stages. The model is a `PipelineModule`, which has
    divided its layers already when this section is read.
    """

    stages: Literal["auto"] | Positive = Field(
        default="auto",
        description='Number of pipeline stages, which must be that of the model; "auto" takes it from the model.',
    )
    partition: str = Field(default="best", description="Method that divides the layers among stages.")
    seed_layers: bool = Field(
        default=False, description="Seeds the random generators before each layer is constructed."
    )
    activation_checkpoint_interval: Count = Field(
        default=0,
        description="Number of layers that are recomputed together in the backward; 0 leaves it as the model has it.",
    )
    pipe_partitioned: bool = Field(default=True, description="Sends activations in model-parallel parts.")
    grad_partitioned: bool = Field(default=True, description="Sends gradients in model-parallel parts.")
    use_reentrant: bool = Field(default=True, description="Recomputes with torch's reentrant checkpointing.")
    schedule: Literal["auto", "gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "dualpipev"] = Field(
        default="auto",
        description="Name of the schedule; it must place stages on ranks as the schedule for which the model was "
        'divided. "auto" takes that of the model.',
    )
    receive_ahead: Positive = Field(
        default=1, description="Number of computations before its use from which on a message may arrive."
    )
    max_unsharded: Positive = Field(
        default=2,
        description="Number of stages of a rank whose parameters may be gathered at the same time, at ZeRO stage 3.",
    )
    timeout_s: float = Field(
        default=1800.0,
        gt=0,
        description="Number of seconds after which a message between stages that has not arrived is an error.",
    )
