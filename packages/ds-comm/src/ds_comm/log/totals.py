"""What is known of the calls of one collective with one size."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

RECENT = 1024
"""Calls of which single durations are kept, for the search of stragglers: memory stays bounded in a long job."""


class Key(NamedTuple):
    """Calls with the same key are counted together."""

    operation: str
    num_bytes: int
    """Of the largest tensor, or list of tensors, of the call on this rank; 0 if it is not known."""
    ranks: int
    caller: str
    """File, line and function of the call; empty without `LogOptions.debug`."""


@dataclass
class Total:
    """Sums over the calls with one key on one rank."""

    count: int = 0
    timed: int = 0
    """Calls whose end was observed."""
    time_s: float = 0.0
    """From the call to its end, over the timed calls. Includes waiting for ranks that arrive later."""
    sent_bytes: float = 0.0
    """Bytes that this rank has sent: counted where the sender counts them, otherwise those of the best algorithm."""
    recent_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    """Durations of the last timed calls."""

    def add_time(self, seconds: float) -> None:
        """Counts the end of a call."""
        self.timed += 1
        self.time_s += seconds
        self.recent_s.append(seconds)
