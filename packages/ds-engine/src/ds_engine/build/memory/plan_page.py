"""The picture of a plan: of one job, of a pipeline, or of every stage over the number of ranks."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import ds_zero
from ds_engine.build.memory.plan_table import STAGES, PlanTable
from ds_engine.files import write_whole
from ds_engine.step_time import Cost, StepTime

if TYPE_CHECKING:
    from ds_engine.build.memory.pipeline_plan import PipelinePlan
    from ds_engine.build.step_time.planned import PlannedStep
    from ds_profiler.html import Unit


def write_page(result: PlannedStep | PipelinePlan | PlanTable, path: Path) -> None:
    """Writes the tables of a plan and its charts as one HTML file.

    Raises:
        ValueError: ds-profiler is not installed.
    """
    write_whole(path, page(result).encode())


def page(result: PlannedStep | PipelinePlan | PlanTable) -> str:
    """The page as text."""
    try:
        from ds_profiler.html import document, table
    except ModuleNotFoundError:
        raise ValueError("--html needs ds-profiler: pip install 'ds-engine[profiler]'") from None
    tables: list[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = [("", *result.rows())]
    tables += [(one.title, one.header, one.rows) for one in result.sections()]
    parts = [f'<div class="charts">{"".join(_charts(result))}</div>', _timeline(result)]
    for title, header, rows in tables:
        parts.append(f"<h2>{html.escape(title)}</h2>" if title else "")
        parts.append(table(_escaped(header), [_escaped(row) for row in rows]))
    parts += [f"<p>{html.escape(line)}</p>" for line in result.verdict()]
    return document(result.title(), "".join(parts))


def _escaped(texts: Sequence[str]) -> list[str]:
    return [html.escape(text) for text in texts]


def _charts(result: PlannedStep | PipelinePlan | PlanTable) -> list[str]:
    from ds_profiler.html import Bars

    if isinstance(result, PlanTable):
        return _over_ranks(result)
    plans: Mapping[str, ds_zero.Plan]
    if hasattr(result, "plans"):
        plans = {f"rank {number}": plan for number, plan in enumerate(result.plans)}
        memory = {name: max(plan.phases, key=lambda one: one.device_bytes) for name, plan in plans.items()}
        title, reserve = "Memory of each pipeline rank at its peak", result.plans[0].reserve_bytes
    else:
        memory = {phase.phase: phase for phase in result.plan.phases}
        title, reserve = "Memory of a rank in each phase", result.plan.reserve_bytes
    bars = [
        (name, {part: float(size) for part, size in phase.parts.items()} | {"reserve": float(reserve)})
        for name, phase in memory.items()
    ]
    charts = [Bars(title=title, bars=bars, unit="bytes").svg()]
    if result.time is not None:
        charts += [_time_bars(result.time), _axes_bars(result.time)]
    return charts


def _time_bars(time: StepTime) -> str:
    from ds_profiler.html import Bars

    parts = {
        "forward and backward": time.compute_s,
        "messages, not hidden": time.exposed_s,
        "update": time.update_s,
    }
    return Bars(title="Time of a step", bars=[("a step", parts)], unit="seconds").svg()


def _axes_bars(time: StepTime) -> str:
    from ds_profiler.html import Bars

    if not time.axes:
        return ""
    bars = [(f"{one.axis} {one.ranks}", {one.axis: one.seconds}) for one in time.axes]
    return Bars(title="Messages of a rank in a step, by axis", bars=bars, unit="seconds").svg()


def _timeline(result: PlannedStep | PipelinePlan | PlanTable) -> str:
    """The schedule of a pipeline, with predicted times."""
    timed = getattr(result, "timed", None)
    if timed is None:
        return ""
    from ds_pipe import draw

    drawn = draw.svg(timed.simulation.spans, unit="s")
    return f"<h2>schedule</h2><div class=scroll>{drawn}</div>"


def _over_ranks(table: PlanTable) -> list[str]:
    from ds_profiler.html import Chart, Line

    def chart(title: str, unit: Unit, value: str, y_label: str = "") -> str:
        lines = []
        for stage in STAGES:
            cells = [cell for cell in table.cells if cell.stage == stage and getattr(cell, value) is not None]
            points = [(float(cell.ranks), _number(getattr(cell, value))) for cell in cells]
            if points:
                lines.append(Line(name=f"stage {stage}", points=points, dotted=True))
        if not lines:
            return ""
        return Chart(
            title=title, lines=lines, x_label="ranks", y_label=y_label, unit=unit, from_zero=True, log_x=True
        ).svg()

    return [
        chart("Peak memory of a rank", "bytes", "device_bytes"),
        chart("Sent by a rank in a step", "bytes", "sent_bytes"),
        chart("Predicted time of a step", "seconds", "step_s"),
        chart("Predicted throughput, all ranks", "", "samples_per_s", "samples per second"),
        chart("Predicted cost of a million samples", "", "cost", "currency of the price"),
    ]


def _number(value: float | Cost) -> float:
    return value.per_million_samples if isinstance(value, Cost) else float(value)
