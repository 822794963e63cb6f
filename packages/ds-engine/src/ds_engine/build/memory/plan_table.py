"""A table of plans of one job: every stage, several numbers of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ds_zero
from ds_engine.build.memory.plan import Planned
from ds_engine.build.memory.predict import Budgets
from ds_engine.build.step_time.sections import Section
from ds_engine.build.step_time.work import ModelWork, work_of, workload
from ds_engine.config import DsConfig
from ds_engine.step_time import Cost, Rates, seconds_text, simulate
from ds_zero.tensors.sizes import human_bytes

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What all plans of a table share; see `ds_engine.build.memory.plan.Planned`."""

    micro_batch: int | None = None
    checkpointing: bool = False
    device: str | None = None
    budget_bytes: int | None = None
    host_budget_bytes: int | None = None
    steps: int | None = None
    """Optimizer steps of the whole run, for its duration and cost."""

    def budgets(self) -> Budgets:
        return Budgets(device_bytes=self.budget_bytes, host_bytes=self.host_budget_bytes)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The peak memory of a rank at one stage and one number of ranks."""

    stage: int
    ranks: int
    device_bytes: int | None
    """None if there is no plan; `reason` says why."""
    host_bytes: int = 0
    fits: bool | None = None
    """None without a budget, or without a plan."""
    sent_bytes: int | None = None
    """Bytes that a rank sends in a step; None without inputs of the model."""
    step_s: float | None = None
    """Predicted seconds of a step; None without rates."""
    samples_per_s: float | None = None
    """Predicted throughput of all ranks."""
    cost: Cost | None = None
    """Predicted cost; None without a price among the rates."""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class PlanTable:
    """Peak memory of a rank: a row for each stage, a column for each number of ranks."""

    model: str
    cells: tuple[Cell, ...]
    budget: str = ""

    @property
    def fits(self) -> bool | None:
        """Whether any cell fits; None without a budget."""
        verdicts = [cell.fits for cell in self.cells if cell.fits is not None]
        return any(verdicts) if verdicts else None

    def title(self) -> str:
        timed = any(cell.step_s is not None for cell in self.cells)
        return f"{self.model}: peak memory of a rank" + (", time of a step" if timed else "")

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows."""
        counts = list(dict.fromkeys(cell.ranks for cell in self.cells))
        header = ["", *(f"{n} rank{'s' if n > 1 else ''}" for n in counts)]
        rows = [
            [f"stage {stage}", *(_text(cell) for cell in self.cells if cell.stage == stage)]
            for stage in STAGES
        ]
        return header, rows

    def sections(self) -> list[Section]:
        """No further tables: the cells hold everything."""
        return []

    def verdict(self) -> list[str]:
        """Returns the lines below the table."""
        lines = [f"x: does not fit in {self.budget}"] if any(c.fits is False for c in self.cells) else []
        reasons = dict.fromkeys(cell.reason for cell in self.cells if cell.reason)
        return lines + [f"-: {reason}" for reason in reasons]

    def to_json(self) -> str:
        """Returns the model and all cells."""
        return json.dumps({"model": self.model, "cells": [asdict(cell) for cell in self.cells]}, indent=2)


def compare(
    settings: DsConfig,
    factory: Callable[[], Any],
    counts: Sequence[int],
    options: Options,
    *,
    say: Callable[[str], None],
    rates: Rates | None = None,
) -> PlanTable:
    """Plans every stage on every number of ranks.

    Args:
        say: called with a line about the current plan.
        rates: of the machines, for the time of a step; None: no times.

    Raises:
        ValueError: nothing can be planned.
    """
    model = "the model"
    cells = []
    work: ModelWork | None = None
    for stage in STAGES:
        for ranks in counts:
            say(f"planning stage {stage} on {ranks} ranks")
            try:
                planned = Planned.of(
                    _at_stage(settings, stage),
                    factory,
                    ranks=ranks,
                    micro_batch=options.micro_batch,
                    device=options.device,
                )
                made = planned.memory(checkpointing=options.checkpointing, budgets=options.budgets())
                if rates is not None and work is None:
                    work = work_of(planned.model, planned.inputs, planned.samples, planned.axes)
            except ValueError as error:
                cells.append(Cell(stage=stage, ranks=ranks, device_bytes=None, reason=str(error)))
                continue
            model = f"{made.model}, {made.params_numel:,} parameters, {made.device}"
            cells.append(
                Cell(
                    stage=stage,
                    ranks=ranks,
                    device_bytes=made.device_bytes,
                    host_bytes=made.host_bytes if made.device != "cpu" else 0,
                    fits=made.fits,
                    **_costs(planned, made, work, rates),
                )
            )
    if all(cell.device_bytes is None for cell in cells):
        raise ValueError(cells[0].reason)
    return PlanTable(model=model, cells=tuple(cells), budget=_budget(options))


def _costs(
    planned: Planned, made: ds_zero.Plan, work: ModelWork | None, rates: Rates | None
) -> dict[str, Any]:
    costs: dict[str, Any] = {"sent_bytes": sum(made.sent_bytes.values()) if made.sent_bytes else None}
    if work is not None and rates is not None:
        seconds = simulate(workload(planned.job, made, work, planned.samples), rates).total_s
        costs |= {
            "step_s": seconds,
            "samples_per_s": planned.step_samples / seconds,
            "cost": planned.cost(seconds, rates, None),
        }
    return costs


def _at_stage(settings: DsConfig, stage: int) -> DsConfig:
    zero = settings.zero_optimization.model_copy(update={"stage": stage})
    return settings.model_copy(update={"zero_optimization": zero})


def _budget(options: Options) -> str:
    budgets = [] if options.budget_bytes is None else [human_bytes(options.budget_bytes)]
    if options.host_budget_bytes is not None:
        budgets.append(f"{human_bytes(options.host_budget_bytes)} of host memory")
    return " and ".join(budgets)


def _text(cell: Cell) -> str:
    if cell.device_bytes is None:
        return "-"
    text = human_bytes(cell.device_bytes)
    if cell.host_bytes:
        text += f" + {human_bytes(cell.host_bytes)} host"
    if cell.step_s is not None:
        text += f", {seconds_text(cell.step_s)}"
    return f"{text} x" if cell.fits is False else text
