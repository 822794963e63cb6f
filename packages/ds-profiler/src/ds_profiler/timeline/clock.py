"""Puts the clocks of several machines in relation, by messages between ranks (Cristian, "Probabilistic clock
synchronization", 1989).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ClockOffset:
    """How the clock of a rank differs from that of rank 0."""

    offset_ns: int
    """Added to a time of this rank it gives the time of rank 0."""
    error_ns: int
    """The offset may be wrong by this much: half of the fastest round trip."""


def estimate(sent: list[int], answered: list[int], received: list[int]) -> ClockOffset:
    """The offset from round trips: when this rank asked, what rank 0's clock said, when the answer came. The fastest
    round trip counts.
    """
    trips = [b - a for a, b in zip(sent, received, strict=True)]
    best = min(range(len(trips)), key=trips.__getitem__)
    middle = sent[best] + trips[best] // 2
    return ClockOffset(answered[best] - middle, (trips[best] + 1) // 2)


def offset_to_first_rank(
    group: ProcessGroup | None = None, *, rounds: int = 8, now: Callable[[], int] = time.time_ns
) -> ClockOffset:
    """Measures the offset of this rank to rank 0 of the group. Collective; the group needs a backend for CPU tensors.

    Args:
        rounds: round trips of each rank; they happen one rank after the other, some microseconds each.
        now: the clock.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    message = torch.zeros(1, dtype=torch.int64)
    result = ClockOffset(0, 0)
    for other in range(1, world):
        if rank == 0:
            for _ in range(rounds):
                dist.recv(message, group=group, group_src=other)
                message.fill_(now())
                dist.send(message, group=group, group_dst=other)
        elif rank == other:
            sent, answered, received = [], [], []
            for _ in range(rounds):
                sent.append(now())
                dist.send(message, group=group, group_dst=0)
                dist.recv(message, group=group, group_src=0)
                received.append(now())
                answered.append(int(message.item()))
            result = estimate(sent, answered, received)
    return result
