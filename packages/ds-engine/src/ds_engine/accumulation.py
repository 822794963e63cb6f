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

    def at_boundary(self) -> bool:
        """Whether the micro-batch that is being worked on completes a batch."""
        return (self.micro_steps + 1) % self.steps == 0

    def advance(self) -> None:
        self.micro_steps += 1
