"""The section `pipeline`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_engine.config.support.section import Count, Positive, Section


class PipelineConfig(Section):
    """Pipeline parallelism: the layers of a model are divided into stages."""

    stages: Literal["auto"] | Positive = Field(
        default="auto", description='Number of pipeline stages; "auto" takes it from the model.'
    )
    partition: str = Field(default="best", description="Method that divides the layers among stages.")
    seed_layers: bool = Field(
        default=False, description="Seeds the random generators before each layer is constructed."
    )
    activation_checkpoint_interval: Count = Field(
        default=0, description="Number of layers that are recomputed together; 0 recomputes none."
    )
    pipe_partitioned: bool = Field(default=True, description="Sends activations in model-parallel parts.")
    grad_partitioned: bool = Field(default=True, description="Sends gradients in model-parallel parts.")
    use_reentrant: bool = Field(default=True, description="Recomputes with torch's reentrant checkpointing.")
