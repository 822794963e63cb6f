"""What one sees of a running training: a live progress bar, or lines."""

from __future__ import annotations

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
