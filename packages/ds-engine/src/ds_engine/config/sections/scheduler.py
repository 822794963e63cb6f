"""The section `scheduler`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ds_engine.config.support.section import Section


class SchedulerConfig(Section):
    """Which learning-rate schedule `initialize` builds when none is passed; it moves once per optimizer
    step.
    """

    type: str = Field(
        description="Name of the schedule: WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest, or "
        "any class in torch.optim.lr_scheduler. Case is ignored."
    )
    params: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of the schedule, for example warmup_num_steps and total_num_steps.",
    )
