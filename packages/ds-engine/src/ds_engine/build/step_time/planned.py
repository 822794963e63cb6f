"""A plan of memory and messages, with the predicted time of a step."""

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
from ds_engine.build.step_time.work import work_of, workload
from ds_engine.config import DsConfig
from ds_engine.step_time import Rates, StepTime, simulate


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """What `ds plan` prints for one stage and one number of ranks."""

    plan: ds_zero.Plan
    time: StepTime | None
    """None without rates."""

    @property
    def fits(self) -> bool | None:
        """Whether the peaks are within the budgets; None without a budget."""
        return self.plan.fits

    def title(self) -> str:
        return self.plan.title()

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows."""
        return self.plan.rows()

    def verdict(self) -> list[str]:
        """The lines below the table."""
        return self.plan.verdict() + ([] if self.time is None else [str(self.time)])

    def to_json(self) -> str:
        """The fields of the plan, and `time`."""
        whole: dict[str, Any] = json.loads(self.plan.to_json())
        if self.time is not None:
            whole["time"] = asdict(self.time)
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
    if rates is None:
        return PlannedStep(plan=plan, time=None)
    work = work_of(planned.model, planned.inputs, planned.samples)
    return PlannedStep(plan=plan, time=simulate(workload(planned.job, plan, work, planned.samples), rates))


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
