"""A plan of memory and messages, with the predicted time and cost of a step."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import ds_zero
from ds_engine.build.memory.model_source import model_factory
from ds_engine.build.memory.plan import Planned
from ds_engine.build.memory.plan_table import Options
from ds_engine.build.step_time.calibrate import calibrate
from ds_engine.build.step_time.sections import (
    Section,
    Tier,
    axes_section,
    tiers_of,
    tiers_section,
    time_section,
)
from ds_engine.build.step_time.work import work_of, workload
from ds_engine.config import DsConfig
from ds_engine.step_time import AxisTime, Cost, Rates, StepTime, Workload, simulate


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """What `ds plan` prints for one stage and one number of ranks."""

    plan: ds_zero.Plan
    time: StepTime | None
    """None without rates."""
    axes: tuple[AxisTime, ...] = ()
    """Messages of each axis with several ranks; without rates, their times are 0."""
    tiers: tuple[Tier, ...] = ()
    cost: Cost | None = None
    """None without a price."""

    @property
    def fits(self) -> bool | None:
        """Whether the peaks are within the budgets; None without a budget."""
        return self.plan.fits

    def title(self) -> str:
        return self.plan.title()

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows."""
        return self.plan.rows()

    def sections(self) -> list[Section]:
        """The tables after that of memory."""
        made = [] if self.time is None else [time_section(self.time)]
        if self.axes:
            made.append(axes_section(self.axes))
        if self.tiers:
            made.append(tiers_section(self.tiers))
        return made

    def verdict(self) -> list[str]:
        """The lines below the tables."""
        lines = self.plan.verdict() + ([] if self.time is None else [str(self.time)])
        return lines + ([] if self.cost is None else self.cost.lines())

    def to_json(self) -> str:
        """The fields of the plan, and `time`, `axes`, `tiers` and `cost`."""
        whole: dict[str, Any] = json.loads(self.plan.to_json())
        if self.time is not None:
            whole["time"] = asdict(self.time)
        whole["axes"] = [asdict(one) for one in self.axes]
        whole["tiers"] = [asdict(one) for one in self.tiers]
        whole["cost"] = None if self.cost is None else asdict(self.cost)
        return json.dumps(whole, indent=2)


def planned_step(
    settings: DsConfig, factory: Callable[[], Any], ranks: int, options: Options, rates: Rates | None
) -> PlannedStep:
    """Plans one job.

    Args:
        rates: of the machines; None: the time is not predicted.

    Raises:
        ValueError: the model cannot be planned, or its factory gives no inputs and the time is wanted.
    """
    planned = Planned.of(
        settings, factory, ranks=ranks, micro_batch=options.micro_batch, device=options.device
    )
    plan = planned.memory(checkpointing=options.checkpointing, budgets=options.budgets())
    if rates is None and (not planned.axes.groups or planned.inputs is None):
        idle = Workload(units=(), ranks=plan.ranks, micro_batches=planned.job.batch.steps)
        return PlannedStep(plan=plan, time=None, tiers=tuple(tiers_of(plan, idle, None)))
    counted = work_of(planned.model, planned.inputs, planned.samples, planned.axes)
    work = workload(planned.job, plan, counted, planned.samples)
    tiers = tuple(tiers_of(plan, work, rates))
    if rates is None:
        return PlannedStep(plan=plan, time=None, axes=work.axes(), tiers=tiers)
    time = simulate(work, rates)
    return PlannedStep(
        plan=plan,
        time=time,
        axes=time.axes,
        tiers=tiers,
        cost=planned.cost(time.total_s, rates, options.steps),
    )


def measured_rates(
    settings: DsConfig, where: str, tokens: int | None, processes: int, options: Options
) -> Rates:
    """Measures the rates of this machine with the model; see `calibrate`."""
    planned = Planned.of(
        settings,
        model_factory(where, tokens=tokens),
        ranks=processes,
        micro_batch=options.micro_batch,
        device=options.device,
    )
    work = work_of(planned.model, planned.inputs, planned.samples)
    return calibrate(settings, where, tokens, planned.samples, processes, work.flops(planned.samples))
