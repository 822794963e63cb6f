"""One line every so many steps, on rank 0."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass


def to_stderr(line: str) -> None:
    """Standard output belongs to the user's script."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one optimizer step did."""

    step: int
    samples: int
    """Samples seen since the beginning of training."""
    lr: float
    grad_norm: float
    """Before clipping."""
    clipped_norm: float
    """After clipping."""
    loss_scale: float = 1.0
    """Of this step's losses."""
    next_scale: float = 1.0
    """Of the next step's."""
    culprit: str | None = None
    """Where a gradient that is not finite was found, if that made the step be skipped."""

    @property
    def skipped(self) -> bool:
        return self.culprit is not None


class Progress:
    """Writes a line for every `every`-th step (0: none), and one for each step that was skipped. Ranks other
    than 0 are silent.
    """

    def __init__(self, every: int, rank: int, write: Callable[[str], None] = to_stderr) -> None:
        self.every = every
        self.silent = rank != 0
        self.write = write
        self._since = time.perf_counter()
        self._samples = 0

    def resume(self, samples: int) -> None:
        """Count from here: a checkpoint was loaded."""
        self._since, self._samples = time.perf_counter(), samples

    def report(self, step: StepReport) -> None:
        if self.silent:
            return
        if step.skipped:
            moved = "" if step.loss_scale == step.next_scale else f" -> {step.next_scale:g}"
            scale = "" if step.loss_scale == 1.0 else f"; loss scale {step.loss_scale:g}{moved}"
            self.write(
                f"step {step.step}: skipped on all ranks, because the gradient norm is {step.grad_norm}, nearest "
                f"to the loss in {step.culprit}{scale}"
            )
        if self.every and step.step % self.every == 0:
            now = time.perf_counter()
            rate = (step.samples - self._samples) / max(now - self._since, 1e-9)
            self._since, self._samples = now, step.samples
            clipped = f" (clipped to {step.clipped_norm:.4g})" if step.clipped_norm < step.grad_norm else ""
            scale = "" if step.loss_scale == 1.0 else f", loss scale {step.next_scale:g}"
            self.write(
                f"step {step.step}: lr {step.lr:.3e}, gradient norm {step.grad_norm:.4g}{clipped}{scale}, "
                f"{step.samples} samples, {rate:.4g} samples/s"
            )
