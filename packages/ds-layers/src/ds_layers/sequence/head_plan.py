"""Which heads each rank computes in Ulysses: pure arithmetic."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

Ranges = tuple[tuple[int, int], ...]
"""Half-open ranges of heads, one for each rank."""


@dataclass(frozen=True)
class HeadPlan:
    """The heads of every rank of a sequence-parallel group."""

    queries: Ranges
    """Disjoint, and together all query heads."""
    keys: Ranges
    """The key and value heads that the query heads of a rank use. They overlap if ranks share a key head."""
    sharing: int
    """Number of consecutive query heads that use the same key head."""

    def expansion(self, rank: int) -> list[int] | None:
        """Returns, for each query head of a rank, the index of its key head among those of the rank; None if each key
        head serves the same number of query heads, so that attention functions need no expansion.
        """
        (begin, end), (first, last) = self.queries[rank], self.keys[rank]
        if (end - begin) == (last - first) * self.sharing or last - first == 1:
            return None
        return [head // self.sharing - first for head in range(begin, end)]

    def sent_heads(self, rank: int) -> tuple[int, int]:
        """Returns the number of query heads and of key heads of one token that `rank` sends to others."""
        others = [index for index in range(len(self.queries)) if index != rank]
        return (
            sum(self.queries[i][1] - self.queries[i][0] for i in others),
            sum(self.keys[i][1] - self.keys[i][0] for i in others),
        )


def plan_heads(heads: int, kv_heads: int, ranks: int) -> HeadPlan:
    """Divides heads among ranks as evenly as possible; the first ranks get one more if necessary.

    Raises:
        ValueError: there are fewer heads than ranks, or the numbers of heads do not divide each other.
    """
    if heads < ranks:
        raise ValueError(
            f"Ulysses gives every rank at least one head, and there are {heads} heads for {ranks} sequence-parallel "
            "ranks: use fewer ranks, RingAttention, or Ulysses with RingAttention as the inner attention"
        )
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"{heads} query heads cannot share {kv_heads} key heads: the first number must be a multiple of the second"
        )
    sharing = heads // kv_heads
    size, larger = divmod(heads, ranks)
    begins = [rank * size + min(rank, larger) for rank in range(ranks + 1)]
    queries = tuple(itertools.pairwise(begins))
    keys = tuple((begin // sharing, -(-end // sharing)) for begin, end in queries)
    return HeadPlan(queries, keys, sharing)
