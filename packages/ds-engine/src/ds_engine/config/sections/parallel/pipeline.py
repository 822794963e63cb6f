"""The section `pipeline`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_engine.config.support.section import Count, Positive, Section


class PipelineConfig(Section):
    """Settings of a model that is cut into stages."""

    stages: Literal["auto"] | Positive = Field(default="auto", description="Stages; auto: as the model says.")
    partition: str = Field(default="best", description="How layers are dealt out.")
    seed_layers: bool = Field(default=False, description="Seed the generators before each layer is built.")
    activation_checkpoint_interval: Count = Field(
        default=0, description="Layers between two activations that are kept; 0: keep all."
    )
    pipe_partitioned: bool = Field(default=True, description="Send activations in model-parallel parts.")
    grad_partitioned: bool = Field(default=True, description="Send gradients in model-parallel parts.")
    use_reentrant: bool = Field(default=True, description="Recompute with torch's reentrant checkpoint.")
