"""When a micro-batch completes a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Accumulation:
    """Counts micro-batches; the last one of every `steps` is the boundary, where the optimizer runs."""

    steps: int
    """Micro-batches per optimizer step; where the caller decides, only what losses are divided by."""
    micro_steps: int = 0
    """Micro-batches completed since the beginning of training."""
    forced: bool | None = None
    """What the caller says about the present micro-batch, and the following ones until it says something else;
    None counts."""
    managed: bool = True
    """False: every `step()` is a boundary, after as many micro-batches as the caller likes."""
    arrived: int = 0
    """Losses that went backward since the last boundary."""
    strict: bool = True
    """A `step()` without a backward before it is an error; False: it ends a micro-batch without gradients."""
    _fresh: bool = False
    _in_step: bool = False

    def at_boundary(self) -> bool:
        """Whether the micro-batch that is being worked on completes a batch; where the caller decides, that is known
        inside `step()` only.
        """
        if not self.managed:
            return self._in_step
        if self.forced is not None:
            return self.forced
        return (self.micro_steps + 1) % self.steps == 0

    def note_backward(self) -> None:
        """Count a loss that goes backward, divided by `steps`."""
        self.arrived += 1
        self._fresh = True

    @property
    def pending(self) -> int:
        """Micro-batches whose gradients wait for the next boundary."""
        return self.micro_steps % self.steps if self.managed else self.arrived

    @contextmanager
    def ending(self) -> Iterator[bool]:
        """Around a `step()`: gives whether it is a boundary, and counts when it has succeeded.

        Raises:
            RuntimeError: no loss went backward through the engine since the last `step()`.
        """
        if self.strict and not self._fresh:
            raise RuntimeError(
                "engine.step(): no engine.backward(loss) came before it. Call engine.backward(loss), or "
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
