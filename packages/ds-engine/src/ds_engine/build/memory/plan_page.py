"""The picture of a table of plans: memory, messages and time of each stage, over the number of ranks."""

from __future__ import annotations

import html
from pathlib import Path

from ds_engine.build.memory.plan_table import STAGES, PlanTable
from ds_engine.files import write_whole


def write_page(table: PlanTable, path: Path) -> None:
    """Writes the table and its charts as one HTML file.

    Raises:
        ValueError: ds-profiler is not installed.
    """
    write_whole(path, page(table).encode())


def page(table: PlanTable) -> str:
    """The page as text."""
    try:
        from ds_profiler.html import Chart, Line, Unit, document
        from ds_profiler.html import table as html_table
    except ModuleNotFoundError:
        raise ValueError("--html needs ds-profiler: pip install 'ds-engine[profiler]'") from None

    def chart(title: str, unit: Unit, value: str, y_label: str = "") -> str:
        lines = []
        for stage in STAGES:
            cells = [cell for cell in table.cells if cell.stage == stage and getattr(cell, value) is not None]
            points = [(float(cell.ranks), float(getattr(cell, value))) for cell in cells]
            if points:
                lines.append(Line(name=f"stage {stage}", points=points, dotted=True))
        if not lines:
            return ""
        return Chart(
            title=title, lines=lines, x_label="ranks", y_label=y_label, unit=unit, from_zero=True, log_x=True
        ).svg()

    charts = (
        chart("Peak memory of a rank", "bytes", "device_bytes"),
        chart("Sent by a rank in a step", "bytes", "sent_bytes"),
        chart("Predicted time of a step", "seconds", "step_s"),
        chart("Predicted throughput, all ranks", "", "samples_per_s", "samples per second"),
    )
    header, rows = table.rows()
    cells = [[html.escape(text) for text in row] for row in rows]
    remarks = "".join(f"<p>{html.escape(line)}</p>" for line in table.verdict())
    body = f'<div class="charts">{"".join(charts)}</div>{html_table(header, cells)}{remarks}'
    return document(table.title(), body)
