"""The section `zero_optimization.zenflow`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ds_engine.config.support.section import Count, Positive, Section, Share


class ZenFlowConfig(Section):
    """ZenFlow: the columns with the largest gradients are stepped at once, the others later on the host."""

    topk_ratio: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1, description="Fraction of the columns that is stepped at once, between 0 and 1."
    )
    select_strategy: Literal["auto", "step", "epoch"] = Field(
        default="auto", description="Unit in which select_interval counts."
    )
    select_interval: Literal["auto"] | Positive = Field(
        default="auto",
        description='Number of steps or epochs between two selections of columns; "auto" adapts it.',
    )
    update_interval: Literal["auto"] | Positive = Field(
        default="auto",
        description='Number of steps between two updates of the other columns; "auto" adapts it.',
    )
    overlap_step: bool = Field(
        default=False, description="Runs the optimizer on the host while the next batch computes."
    )
    offload: bool = Field(
        default=False, description="Keeps the states of the selected columns on the host too."
    )
    auto_ratio: Share = Field(
        default=0.99,
        description='Threshold that update_interval "auto" compares gradients with, between 0 and 1.',
    )
    full_warm_up_rounds: Count = Field(
        default=0, description="Number of steps at the start that update all columns."
    )
    pt_reserved_cores_perc: Share = Field(
        default=0.5, description="Fraction of the cores that is reserved for torch, between 0 and 1."
    )
    steps_per_epoch: Positive | None = Field(
        default=None, description="Number of steps per epoch. Default: measured during training."
    )
