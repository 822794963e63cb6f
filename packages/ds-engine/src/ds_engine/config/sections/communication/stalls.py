"""The section `stall_reports`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ds_engine.config.support.section import NotNegative, Section


class StallReportsConfig(Section):
    """Says which ranks others wait for in calls of torch.distributed's functions: the rank, the parameter, the line.
    Collectives of sharded training are watched in any case.
    """

    enabled: bool | None = Field(
        default=None,
        description="Watches such calls in a job of several ranks. Default: if `ds run` or `deepspeed` has started it.",
    )
    timeout_s: Annotated[NotNegative, Field(gt=0)] = Field(
        default=30.0, description="Seconds that a rank waits before one rank reports. Nothing is ended."
    )
