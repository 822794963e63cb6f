"""Reduced gradients of one bucket, added up over micro-batches.

[Note: tree over micro-batches]
Floating-point sums depend on their order. Let global micro-batch g = k W + r be the k-th of rank r of W. A
reduction adds the W micro-batches of one k in a binary tree over r; here the results for k = 0, 1, ... are
merged as a binary counter counts: two sums of 2^j reductions become one of 2^(j+1). For W a power of two both
together are one and the same tree over g, whatever W is: the same micro-batches on 1, 2, 4 or 8 ranks give
the same bits. At most log2(k) sums wait besides the new one; the lowest is the optimizer's gradient itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_zero.comm.collectives import Comm
from ds_zero.interfaces import Reservation, ShardKey, ShardStore
from ds_zero.layout.buckets import piece_of
from ds_zero.runtime.bucket import Bucket
from ds_zero.tensors.storage import same_place


class Sums:
    """Adds slices into `bucket.grad`, in order of arrival or in [Note: tree over micro-batches]."""

    def __init__(self, bucket: Bucket, store: ShardStore, *, tree: bool) -> None:
        self._bucket, self._store, self._tree = bucket, store, tree
        self._levels: list[int] = []
        """Height of the tree in each buffer that holds a sum; buffer 0 is `bucket.grad`."""
        self._buffers: list[Tensor] = []
        """Buffers 1, 2, ...; reserved when first needed, then kept."""
        self._whole = bucket.layout.by_rows
        """Whether reductions land on every rank as the whole bucket, [Note: gradients by rows]."""
        begin, end = bucket.owned_range if self._whole else bucket.slice_range
        self._offset = begin - bucket.owned_range[0]
        self._numel = end - begin
        self._complete = True

    def add(self, part: Tensor) -> None:
        """Take in this rank's slice of one reduction, or the whole of it [Note: gradients by rows]; entries whose
        gradient is None start a new accumulation.
        """
        bucket = self._bucket
        live = [s for s in bucket.shards if s.numel()]
        if not live:
            return
        kept = [s.grad is not None for s in live]
        if not any(kept):
            self._levels = [0]
            self._sink(part, 0, accumulate=False)
        elif not all(kept):
            self._merge_all()
            self._sink_apart(part)
        elif not self._tree:
            self._sink(part, 0, accumulate=True)
        else:
            self._push(part)
        self._complete = len(self._levels) == 1 and not self._apart
        for shard, view in zip(bucket.shards, bucket.cut(self._grad()), strict=True):
            if shard.grad is None and shard.numel():
                shard.grad = view

    def add_own(self, whole: Tensor) -> None:
        """Add this rank's own gradient of the whole bucket, all of which it owns, without a reduction."""
        bucket, grad = self._bucket, self._grad()
        for shard, view, part in zip(bucket.shards, bucket.cut(grad), bucket.cut(whole), strict=True):
            if shard.grad is None:
                view.copy_(part)
                shard.grad = view
            else:
                shard.grad.add_(part.to(view.device))

    def place(self) -> Tensor | None:
        """Memory into which the next slice may be reduced directly; None where it has to be added to an earlier one."""
        bucket = self._bucket
        grad = bucket.grad
        if grad is None or grad.dtype != torch.float32 or grad.device != bucket.device:
            return None
        if any(s.grad is not None for s in bucket.shards):
            return None
        return self._buffer(0)

    def complete(self, comm: Comm) -> None:
        """Make the entries' gradients final: merge what waits; in stage 0, bring in the other ranks' slices."""
        if self._complete:
            return
        bucket = self._bucket
        self._merge_all()
        if self._apart:
            comm.gather(self._grad(), bucket.ranks).wait()
        self._complete = True

    def so_far(self) -> Tensor:
        """A copy of this rank's slice of what has been added; undefined where an entry has no gradient."""
        top = max(len(self._levels) - 1, 0)
        total = self._buffer(top).clone()
        for index in reversed(range(top)):  # as `_merge_all` adds them
            total += self._buffer(index)
        return self._bucket.slice_of(total) if self._whole else total

    def waiting(self) -> list[Tensor]:
        """Memory that is held besides `bucket.grad`."""
        return self._buffers

    @property
    def _apart(self) -> bool:
        """Whether ranks have summed different slices of what all of them own."""
        return self._bucket.layout.num_owners != self._bucket.ranks.size and not self._whole

    def _grad(self) -> Tensor:
        if self._bucket.grad is None:
            raise AssertionError("gradients have no room")
        return self._bucket.grad

    def _sink(self, part: Tensor, begin: int, *, accumulate: bool) -> None:
        if not accumulate and same_place(part, self._grad()[self._offset + begin :]):
            return  # it landed there
        key = ShardKey(name=self._bucket.layout.name, kind="grad")
        self._store.sink_grad(key, part, offset=self._offset + begin, accumulate=accumulate).wait()

    def _sink_apart(self, part: Tensor) -> None:
        """Some entries accumulate and others start anew."""
        first = self._bucket.owned_range[0] + self._offset
        for shard, slot in zip(self._bucket.shards, self._bucket.layout.slots, strict=True):
            piece = piece_of(slot, first, first + self._numel)
            if piece.numel:
                own = part[piece.offset : piece.offset + piece.numel]
                self._sink(own, piece.offset, accumulate=shard.grad is not None)

    def _buffer(self, index: int) -> Tensor:
        if index == 0:
            return self._grad()[self._offset : self._offset + self._numel]
        if index > len(self._buffers):
            key = ShardKey(name=f"{self._bucket.layout.name}+{index}", kind="grad")
            item = Reservation(
                key=key,
                partition=f"partial sums {index}",
                numel=self._numel,
                dtype=self._grad().dtype,
                device=self._bucket.device,
            )
            self._buffers.append(self._store.reserve([item])[key])
        return self._buffers[index - 1]

    def _push(self, part: Tensor) -> None:
        if self._levels[-1] > 0:
            self._buffer(len(self._levels)).copy_(part)
            self._levels.append(0)
            return
        top = self._buffer(len(self._levels) - 1)
        top.add_(part.to(top.device))
        self._levels[-1] = 1
        while len(self._levels) > 1 and self._levels[-1] == self._levels[-2]:
            self._merge()

    def _merge(self) -> None:
        top = len(self._levels) - 1
        self._buffer(top - 1).add_(self._buffer(top))
        self._levels.pop()
        self._levels[-1] += 1

    def _merge_all(self) -> None:
        while len(self._levels) > 1:
            self._merge()
