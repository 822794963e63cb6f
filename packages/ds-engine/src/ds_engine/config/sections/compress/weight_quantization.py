"""The section `weight_quantization`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ds_engine.config.support.section import Positive, Section


class InferenceWeightsConfig(Section):
    """Weights in few bits for inference."""

    enabled: bool = Field(default=True, description="Quantise.")
    num_bits: Positive = Field(default=8, description="Bits.")
    q_type: Literal["symmetric", "asymmetric"] = Field(
        default="symmetric", description="Whether there is an offset."
    )
    q_groups: Positive = Field(default=1, description="Parts with a scale of their own.")
    quantized_initialization: dict[str, Any] = Field(
        default_factory=dict, description="While the model is made."
    )
    post_init_quant: dict[str, Any] = Field(default_factory=dict, description="After it was made.")
