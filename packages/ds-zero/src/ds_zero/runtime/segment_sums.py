"""Sums over whole tensors whose parts are updated on several ranks, such as the norms of LAMB."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import torch
import torch.distributed as dist
from torch import Tensor

from ds_zero.interfaces import SegmentStep
from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.storage import GRAD, MASTER, visit

STEPPED = (MASTER, GRAD)
"""The tensors of a bucket that an optimizer step uses."""


def whole_sums(optimizer: SegmentStep, buckets: Sequence[Bucket], scale: Tensor) -> dict[int, Tensor]:
    """Computes the sums of all entries' parts on this rank, then all-reduces them over each set of ranks. Collective.

    Returns:
        `id` of an entry -> (number of sums,), fp64, the sums over all parts of its tensor.
    """
    rows: dict[int, Tensor] = {}
    with closing(visit(buckets, STEPPED)) as visited:
        for bucket in visited:
            live = [s for s in bucket.shards if s.grad is not None]
            # Called also without entries, since all ranks must know the number of columns.
            sums = optimizer.segment_sums(live, grad_scale=scale)
            width = sums.shape[1]
            rows |= {id(shard): row for shard, row in zip(live, sums, strict=True)}
    for ranks in {id(b.ranks): b.ranks for b in buckets}.values():
        divided = [b for b in buckets if b.ranks is ranks and b.layout.num_owners > 1]
        entries = [s for b in divided for s in b.shards]
        if ranks.group is None or not entries:
            continue
        # Each rank fills its own part of the table, so that all ranks add the same numbers in the same order.
        table = torch.zeros(ranks.size, len(entries), width, dtype=torch.float64)
        for i, shard in enumerate(entries):
            if id(shard) in rows:
                table[ranks.rank, i] = rows[id(shard)]
        table = table.to(divided[0].device)
        dist.all_reduce(table, group=ranks.group)
        for shard, row in zip(entries, table.sum(0).cpu(), strict=True):
            rows[id(shard)] = row
    return rows
