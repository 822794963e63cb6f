"""What one sees of a training: a live progress bar, and a page with curves that needs only a browser."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PLAIN_EVERY = 20
"""Steps between two lines where the output is no terminal."""


def memory_bytes() -> int:
    """What this process holds now: device memory where there is an accelerator, else resident memory."""
    if torch.accelerator.is_available():
        return int(torch.accelerator.memory_allocated())
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


class Live:
    """Progress on a terminal as a bar, elsewhere as a line now and then. Silent unless `enabled` (rank 0)."""

    def __init__(self, *, total_steps: int, done_steps: int, enabled: bool) -> None:
        self.enabled = enabled
        self.console = Console(highlight=False, quiet=not enabled)
        self._total = total_steps
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (enabled and self.console.is_terminal),
        )
        self._task = self._progress.add_task("loss -", total=total_steps, completed=done_steps)

    def __enter__(self) -> Live:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, row: dict[str, Any]) -> None:
        """Shows one row of the log."""
        memory = row["memory_bytes"] / 2**30
        text = f"loss {row['loss']:.3f}  {row['tokens_per_s']:,.0f} tokens/s  {memory:.2f} GiB/rank"
        self._progress.update(self._task, completed=row["step"], description=text)
        if self.enabled and not self.console.is_terminal and row["step"] % PLAIN_EVERY in (0, 1):
            self.say(f"step {row['step']}/{self._total}  {text}")

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._progress.console.print(text, soft_wrap=True, markup=False)


# ---- the page -----------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 760, 260, 64, 30, 14
COLOURS = ("#1f5fbf", "#c2410c", "#3f7d20")
Line = tuple[str, Sequence[tuple[float, float]]]

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
 body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 800px; margin: 2em auto; padding: 0 1em; color: #222 }}
 h1 {{ font-size: 1.4em }} h2 {{ font-size: 1.05em; margin: 1.6em 0 .2em }} svg {{ width: 100% }}
 table {{ border-collapse: collapse }} td {{ padding: .1em 1em .1em 0 }} text {{ font-size: 11px; fill: #555 }}
 pre {{ background: #f4f4f2; padding: 1em; overflow-x: auto; white-space: pre-wrap }}
</style>
<h1>{title}</h1>
<table>{facts}</table>
{charts}
<h2>Sample</h2><pre>{sample}</pre>
</html>
"""


def page(title: str, facts: dict[str, str], rows: list[dict[str, Any]], bigram: float, sample: str) -> str:
    """The whole page as text."""
    steps = [row["step"] for row in rows]
    validation = [(row["step"], row["validation"]) for row in rows if "validation" in row]
    charts = (
        chart(
            "Loss (nats per byte)",
            [
                ("train", [(row["step"], row["loss"]) for row in rows]),
                ("validation", validation),
                (f"bigram {bigram:.3f}", [(steps[0], bigram), (steps[-1], bigram)]),
            ],
        ),
        chart(
            "Speed (tokens per second, all ranks)",
            [("", [(row["step"], row["tokens_per_s"]) for row in rows])],
        ),
        chart("Memory (MiB, rank 0)", [("", [(row["step"], row["memory_bytes"] / 2**20) for row in rows])]),
    )
    table = "".join(f"<tr><td>{html.escape(k)}<td>{html.escape(v)}" for k, v in facts.items())
    return PAGE.format(
        title=html.escape(title), facts=table, charts="\n".join(charts), sample=html.escape(sample)
    )


def chart(title: str, lines: Sequence[Line]) -> str:
    """One chart as an SVG element: lines over steps, with a legend for those that have a name."""
    points = [point for _, line in lines for point in line]
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = min(y for _, y in points), max(y for _, y in points)
    margin = 0.06 * (y_high - y_low) or abs(y_high) * 0.1 or 1.0
    y_low, y_high = y_low - margin, y_high + margin

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1)
        up = (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - 10), TOP + (1 - up) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for i in range(5):
        value = y_low + (y_high - y_low) * i / 4
        _, y = place(x_low, value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e5e0"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
        x, _ = place(x_low + (x_high - x_low) * i / 4, y_low)
        anchor = "end" if i == 4 else "middle"
        step = round(x_low + (x_high - x_low) * i / 4)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">{step}</text>')
    for i, (name, line) in enumerate(lines):
        coordinates = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        colour = COLOURS[i % len(COLOURS)]
        parts.append(f'<polyline points="{coordinates}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        if name:
            parts.append(
                f'<text x="{WIDTH - 130}" y="{TOP + 12 + 15 * i}" style="fill:{colour}">{html.escape(name)}</text>'
            )
    return f'<h2>{html.escape(title)}</h2><svg viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg>'


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
