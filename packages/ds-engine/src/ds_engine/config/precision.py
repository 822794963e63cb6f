"""The section `bf16`; without it everything is computed in the dtype that the model has, usually fp32."""

from __future__ import annotations

from pydantic import Field

from ds_engine.config.section import Section


class Bf16Config(Section):
    """Compute in bfloat16 with fp32 master parameters, fp32 gradient sums and fp32 optimizer states."""

    enabled: bool = Field(
        default=False,
        description="Cast floating-point parameters and inputs to bfloat16 for forward and backward.",
    )
