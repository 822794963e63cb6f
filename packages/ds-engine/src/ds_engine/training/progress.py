"""Progress lines on rank 0, one every `steps_per_print` steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass


def to_stderr(line: str) -> None:
    """Writes a line to stderr; stdout is left to the user's script."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """The result of one optimizer step."""

    step: int
    samples: int
    """Number of samples processed since the beginning of training."""
    lr: float
    grad_norm: float
    """Global norm before clipping."""
    clipped_norm: float
    """Global norm after clipping."""
    loss_scale: float = 1.0
    """Loss scale of this step."""
    next_scale: float = 1.0
    """Loss scale of the next step."""
    culprit: str | None = None
    """Parameter whose gradient was not finite, if the step was skipped for that."""

    @property
    def skipped(self) -> bool:
        return self.culprit is not None


class Progress:
    """Writes a line for every `every`-th step (0: none), and one for each skipped step. Ranks other than 0 write
    nothing.
    """

    def __init__(
        self,
        every: int,
        rank: int,
        write: Callable[[str], None] = to_stderr,
        *,
        total_steps: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            total_steps: number of optimizer steps of the whole training, for the remaining time; None: unknown.
        """
        self.every = every
        self.silent = rank != 0
        self.write = write
        self.total_steps = total_steps
        self._clock = clock
        self._since = clock()
        self._samples = 0
        self._step = 0

    @property
    def active(self) -> bool:
        """Whether this rank writes any lines."""
        return self.every > 0 and not self.silent

    def due(self, step: int) -> bool:
        """Whether this rank writes a line for step number `step`."""
        return self.active and step % self.every == 0

    def resume(self, samples: int, step: int = 0) -> None:
        """Restarts the measurement of speed, because a checkpoint was loaded."""
        self._since, self._samples, self._step = self._clock(), samples, step

    def report(self, step: StepReport, loss: float | None = None) -> None:
        """Writes the lines about a step, if any.

        Args:
            loss: mean over this rank's micro-batches; None: unknown.
        """
        if self.silent:
            return
        if step.skipped:
            moved = "" if step.loss_scale == step.next_scale else f" -> {step.next_scale:g}"
            scale = "" if step.loss_scale == 1.0 else f"; loss scale {step.loss_scale:g}{moved}"
            self.write(
                f"step {step.step}: skipped on all ranks, because the gradient norm is {step.grad_norm}, nearest "
                f"to the loss in {step.culprit}{scale}"
            )
        if self.due(step.step):
            now = self._clock()
            elapsed_s = max(now - self._since, 1e-9)
            rate = (step.samples - self._samples) / elapsed_s
            clipped = f" (clipped to {step.clipped_norm:.4g})" if step.clipped_norm < step.grad_norm else ""
            scale = "" if step.loss_scale == 1.0 else f", loss scale {step.next_scale:g}"
            left = self._left(step.step, elapsed_s / max(step.step - self._step, 1))
            self._since, self._samples, self._step = now, step.samples, step.step
            self.write(
                f"step {step.step}: {'' if loss is None else f'loss {loss:.4g}, '}lr {step.lr:.3e}, gradient norm "
                f"{step.grad_norm:.4g}{clipped}{scale}, {step.samples} samples, {rate:.4g} samples/s{left}"
            )

    def _left(self, step: int, seconds_a_step: float) -> str:
        if self.total_steps is None or step >= self.total_steps:
            return ""
        return f", {duration((self.total_steps - step) * seconds_a_step)} left of {self.total_steps} steps"


def duration(seconds: float) -> str:
    """Formats a duration: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
