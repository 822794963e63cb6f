"""When a micro-batch completes a batch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Accumulation:
    """Counts micro-batches; the last one of every `steps` is the boundary, where the optimizer runs."""

    steps: int
    """Micro-batches per optimizer step."""
    micro_steps: int = 0
    """Micro-batches completed since the beginning of training."""
    forced: bool | None = None
    """What the caller says about the present micro-batch, and the following ones until it says something else;
    None counts."""

    def at_boundary(self) -> bool:
        """Whether the micro-batch that is being worked on completes a batch."""
        if self.forced is not None:
            return self.forced
        return (self.micro_steps + 1) % self.steps == 0

    def advance(self) -> None:
        self.micro_steps += 1
