"""Counts micro-batches, and decides which of them is an accumulation boundary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Accumulation:
    """Counts micro-batches. The last one of every `steps` is the boundary, at which the optimizer runs."""

    steps: int
    """Number of micro-batches per optimizer step. With `managed` False, only the divisor of losses."""
    micro_steps: int = 0
    """Number of completed micro-batches since the beginning of training."""
    forced: bool | None = None
    """Whether the current and following micro-batches are boundaries, as set by the caller; None: decided by
    counting.
    """
    managed: bool = True
    """False: every `step()` is a boundary, after any number of micro-batches."""
    arrived: int = 0
    """Number of backwards since the last boundary."""
    strict: bool = True
    """Whether a `step()` without a preceding backward is an error. False: it ends a micro-batch without gradients."""
    _fresh: bool = False
    _in_step: bool = False

    def at_boundary(self) -> bool:
        """Whether the current micro-batch is a boundary. With `managed` False it is known only inside `step()`."""
        if not self.managed:
            return self._in_step
        if self.forced is not None:
            return self.forced
        return (self.micro_steps + 1) % self.steps == 0

    def note_backward(self) -> None:
        """Counts a backward."""
        self.arrived += 1
        self._fresh = True

    @property
    def pending(self) -> int:
        """Number of micro-batches whose gradients have not been used by a step yet."""
        return self.micro_steps % self.steps if self.managed else self.arrived

    @contextmanager
    def ending(self) -> Iterator[bool]:
        """Context manager around a `step()`: yields whether it is a boundary, and counts the micro-batch if the step
        succeeded.

        Raises:
            RuntimeError: there was no backward through the engine since the last `step()`.
        """
        if self.strict and not self._fresh:
            raise RuntimeError(
                "engine.step(): there was no engine.backward(loss) before it. Call engine.backward(loss), or "
                "engine.scale(loss).backward(), once for every micro-batch: the engine divides the loss by "
                f"gradient_accumulation_steps ({self.steps}), and a plain loss.backward() does not"
            )
        self._in_step = True
        try:
            boundary = self.at_boundary()
            yield boundary
        finally:
            self._in_step = False
        self._fresh = False
        self.micro_steps += 1 if self.managed else self.arrived
        if boundary:
            self.arrived = 0
