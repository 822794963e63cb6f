"""Collects the results of a step, and passes them to progress lines, curves and timers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ds_engine.device import memory_bytes
from ds_engine.training import timing
from ds_engine.training.monitor import Monitor
from ds_engine.training.progress import Progress, StepReport
from ds_engine.training.timing import Breakdown
from ds_engine.training.trial import Trial


class StepProfiler(Protocol):
    """Observes the parts of every step, and writes a report of its own."""

    def part(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Around one part of a step."""

    def end_step(self) -> None:
        """A step has ended."""


@dataclass(kw_only=True)
class Reporting:
    """Collects the results of an optimizer step, and reports them at its end."""

    progress: Progress
    monitor: Monitor
    breakdown: Breakdown
    profiler: StepProfiler | None = None
    experts: Callable[[int], Mapping[str, float]] | None = None
    """Called on all ranks after every step with its number; returns values of experts for curves, by name. None: the
    model has no experts, or nothing writes curves."""
    trial: Trial | None = None
    """Ends this training after some steps; None: it is no trial of the autotuner."""
    _loss: Tensor | None = field(default=None, init=False)
    """Mean loss over the micro-batches of this step so far, on this rank."""

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Context manager around one part of a step, which measures time and memory, and names it in profiles."""
        observed = contextlib.nullcontext() if self.profiler is None else self.profiler.part(name)
        with self.breakdown.part(name), observed, timing.named(name):
            yield

    def add_loss(self, part: Tensor) -> None:
        """Adds the loss of one micro-batch, divided by their number. It is read only if something reports it."""
        if self.monitor.enabled or self.progress.active:
            self._loss = part.detach() if self._loss is None else self._loss + part.detach()

    def step(self, report: StepReport) -> None:
        """Reports the step that has ended."""
        if self.profiler is not None:
            self.profiler.end_step()
        loss, self._loss = self._loss, None
        wanted = self.monitor.enabled or self.progress.due(report.step)
        value = loss.item() if loss is not None and wanted else None
        self.progress.report(report, value)
        held = memory_bytes(self.breakdown.device) if self.monitor.enabled else None
        self.monitor.step(report, value, self.breakdown.end_step(report.step), memory_bytes=held)
        if self.experts is not None:
            curves = self.experts(report.step)
            self.monitor.write_events([(name, value, report.samples) for name, value in curves.items()])
        if self.trial is not None:
            self.trial.end_step()
