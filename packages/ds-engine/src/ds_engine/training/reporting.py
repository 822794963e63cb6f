"""What an engine reports of its steps, and to whom: lines, curves, times."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

from torch import Tensor

from ds_engine.training.monitor import Monitor
from ds_engine.training.progress import Progress, StepReport
from ds_engine.training.timing import Breakdown


@dataclass(kw_only=True)
class Reporting:
    """Collects what one optimizer step did, and hands it on at its end."""

    progress: Progress
    monitor: Monitor
    breakdown: Breakdown
    _loss: Tensor | None = field(default=None, init=False)
    """Mean over the micro-batches of this step so far, on this rank."""

    def part(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Around one part of a step, for its time and memory."""
        return self.breakdown.part(name)

    def add_loss(self, part: Tensor) -> None:
        """Add one micro-batch's share of the loss; read only where somebody wants it."""
        if self.monitor.enabled or self.progress.active:
            self._loss = part.detach() if self._loss is None else self._loss + part.detach()

    def step(self, report: StepReport) -> None:
        """The end of a step."""
        loss, self._loss = self._loss, None
        wanted = self.monitor.enabled or self.progress.due(report.step)
        value = loss.item() if loss is not None and wanted else None
        self.progress.report(report, value)
        self.monitor.step(report, value, self.breakdown.end_step(report.step))
