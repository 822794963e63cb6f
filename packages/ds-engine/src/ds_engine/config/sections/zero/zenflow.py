"""The section `zero_optimization.zenflow`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ds_engine.config.support.section import Count, Positive, Section, Share


class ZenFlowConfig(Section):
    """Step the columns with the largest gradients on the accelerator at once, the rest on the host later."""

    topk_ratio: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1, description="Part of the columns that is stepped at once."
    )
    select_strategy: Literal["auto", "step", "epoch"] = Field(
        default="auto", description="Unit in which select_interval counts."
    )
    select_interval: Literal["auto"] | Positive = Field(
        default="auto", description="Steps or epochs between two choices of columns."
    )
    update_interval: Literal["auto"] | Positive = Field(
        default="auto", description="Steps between two updates of the other columns."
    )
    overlap_step: bool = Field(default=False, description="Step on the host while the next batch computes.")
    offload: bool = Field(default=False, description="Keep the states of the chosen columns on the host too.")
    auto_ratio: Share = Field(default=0.99, description='Threshold of update_interval "auto".')
    full_warm_up_rounds: Count = Field(default=0, description="Steps at the beginning that step everything.")
    pt_reserved_cores_perc: Share = Field(default=0.5, description="Part of the cores that torch keeps.")
    steps_per_epoch: Positive | None = Field(
        default=None, description="Found out while running; leave it out."
    )
