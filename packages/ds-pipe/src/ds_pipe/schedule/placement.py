"""Which rank runs which stage."""

from __future__ import annotations


def looped(num_ranks: int, chunks: int = 1) -> tuple[int, ...]:
    """Rank of every stage when stages go round the ranks: 0 1 2 3 0 1 2 3 for 4 ranks with 2 stages each."""
    return tuple(stage % num_ranks for stage in range(num_ranks * chunks))


def v_shaped(num_ranks: int) -> tuple[int, ...]:
    """Rank of every stage when stages go down the ranks and back: 0 1 2 3 3 2 1 0 for 4 ranks."""
    return (*range(num_ranks), *reversed(range(num_ranks)))
