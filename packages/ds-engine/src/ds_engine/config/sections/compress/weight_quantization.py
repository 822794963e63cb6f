"""The section `weight_quantization`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ds_engine.config.support.section import Positive, Section


class InferenceWeightsConfig(Section):
    """Quantised weights for inference."""

    enabled: bool = Field(default=True, description="Quantises weights.")
    num_bits: Positive = Field(default=8, description="Number of bits of a weight.")
    q_type: Literal["symmetric", "asymmetric"] = Field(
        default="symmetric", description='"symmetric" has a scale only, "asymmetric" an offset too.'
    )
    q_groups: Positive = Field(
        default=1, description="Number of parts of a tensor that have a scale of their own."
    )
    quantized_initialization: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings for weights that are quantised while the model is constructed.",
    )
    post_init_quant: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings for weights that are quantised after the model was constructed.",
    )
