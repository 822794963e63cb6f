"""The section `local_sgd`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ds_engine.config.support.section import Count, NotNegative, Positive, Section


class LocalSgdConfig(Section):
    """Ranks step alone, and an outer optimizer averages what they did now and then: local SGD, DiLoCo."""

    sync_every: Positive = Field(
        default=64,
        description="Number of optimizer steps from one outer step to the next. Ranks send nothing in between.",
    )
    start_step: Count = Field(
        default=0,
        description="Number of first optimizer steps in which gradients are averaged over ranks in every step.",
    )
    outer_lr: NotNegative = Field(
        default=0.7,
        description="Learning rate of the outer SGD. With 1, and outer_momentum 0, parameters are averaged.",
    )
    outer_momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.9, description="Nesterov momentum of the outer SGD."
    )
    compression: Literal["none", "int8", "int4", "sign", "topk"] = Field(
        default="none",
        description='How outer gradients are sent: "none" in fp32, the others in fewer bits, with error feedback. '
        '"topk" sends the largest elements of each block.',
    )
    density: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1 / 64, description='Fraction of the elements that compression "topk" sends.'
    )
    residual_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="Dtype of the residuals of the error feedback."
    )
