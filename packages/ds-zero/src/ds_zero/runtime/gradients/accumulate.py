"""Reduced gradients of one bucket, added up over micro-batches.

[Note: tree over micro-batches]
Floating-point sums depend on their order. Let global micro-batch g = k W + r be the k-th of rank r of W. A
reduction adds the W micro-batches of one k in a binary tree over r; here the results for k = 0, 1, ... are
merged as a binary counter counts: two sums of 2^j reductions become one of 2^(j+1). For W a power of two both
together are one and the same tree over g, whatever W is: the same micro-batches on 1, 2, 4 or 8 ranks give
the same bits. At most log2(k) sums wait besides the new one; the lowest is the optimizer's gradient itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ds_zero.comm.collectives import Comm
from ds_zero.layout.buckets import piece_of
from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.resting import Resting
from ds_zero.runtime.storage import GRAD
from ds_zero.tensors.storage import same_place


class Sums:
    """Adds slices into the bucket's gradient at rest, in order of arrival or in [Note: tree over micro-batches]."""

    def __init__(self, bucket: Bucket, *, tree: bool) -> None:
        self._bucket, self._tree = bucket, tree
        self._rest = bucket.storage.rest(GRAD)
        self._levels: list[int] = []
        """Height of the tree in each buffer that holds a sum; buffer 0 is the gradient at rest."""
        self._buffers: list[Resting] = []
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
        zeroed = self._rest.take_zeroed()
        kept = [s.grad is not None and i not in zeroed for i, s in enumerate(bucket.shards) if s.numel()]
        if not kept:
            return
        if not any(kept):
            self._levels = [0]
            self._sink(part, 0, accumulate=False)
        elif not all(kept):
            self._merge_all()
            self._sink_apart(part, zeroed)
        elif not self._tree:
            self._sink(part, 0, accumulate=True)
        else:
            self._push(part)
        self._complete = len(self._levels) == 1 and not self._apart
        for shard, grad in zip(bucket.shards, bucket.storage.grads, strict=True):
            if shard.grad is None and shard.numel():
                shard.grad = grad

    def add_own(self, whole: Tensor) -> None:
        """Add this rank's own gradient of the whole bucket, all of which it owns, without a reduction."""
        storage = self._bucket.storage
        for shard, grad, part in zip(storage.shards, storage.grads, storage.cut(whole), strict=True):
            if shard.grad is None:
                grad.copy_(part)
                shard.grad = grad
            else:
                shard.grad.add_(part.to(grad.device))

    def place(self) -> Tensor | None:
        """Memory into which the next slice may be reduced directly; None where it has to be added to an earlier one."""
        bucket = self._bucket
        grad = self._rest.tensor
        if grad is None or grad.dtype != torch.float32 or grad.device != bucket.device:
            return None
        if any(s.grad is not None for s in bucket.shards):
            return None
        return grad[self._offset : self._offset + self._numel]

    def complete(self, comm: Comm) -> None:
        """Make the entries' gradients final: merge what waits; in stage 0, bring in the other ranks' slices."""
        if self._complete:
            return
        bucket = self._bucket
        self._merge_all()
        if self._apart:
            with self._rest.opened(write=True) as grad:
                comm.gather(grad, bucket.ranks).wait()
        self._complete = True

    def so_far(self) -> Tensor:
        """A copy of this rank's slice of what has been added; undefined where an entry has no gradient."""
        top = max(len(self._levels) - 1, 0)
        with self._opened(top) as last:
            total = last.clone()
        for index in reversed(range(top)):  # as `_merge_all` adds them
            with self._opened(index) as lower:
                total += lower
        return self._bucket.slice_of(total) if self._whole else total

    def settle(self) -> None:
        """Return when the store has taken in everything that was added."""
        self._rest.settle()

    def waiting(self) -> list[Tensor]:
        """Memory that is held besides the gradient at rest."""
        return [buffer.tensor for buffer in self._buffers if buffer.tensor is not None]

    @property
    def _apart(self) -> bool:
        """Whether ranks have summed different slices of what all of them own."""
        return self._bucket.layout.num_owners != self._bucket.ranks.size and not self._whole

    def _sink(self, part: Tensor, begin: int, *, accumulate: bool) -> None:
        offset, grad = self._offset + begin, self._rest.tensor
        if not accumulate and grad is not None and same_place(part, grad[offset:]):
            return  # it landed there
        self._rest.sink(part, offset=offset, accumulate=accumulate)

    def _sink_apart(self, part: Tensor, zeroed: frozenset[int]) -> None:
        """Some entries accumulate and others start anew."""
        first = self._bucket.owned_range[0] + self._offset
        for i, (shard, slot) in enumerate(zip(self._bucket.shards, self._bucket.layout.slots, strict=True)):
            piece = piece_of(slot, first, first + self._numel)
            if piece.numel:
                own = part[piece.offset : piece.offset + piece.numel]
                accumulate = shard.grad is not None and i not in zeroed
                self._sink(own, piece.offset, accumulate=accumulate)

    @contextlib.contextmanager
    def _opened(self, index: int, *, write: bool = False, load: bool = True) -> Iterator[Tensor]:
        """The sum in one buffer, which is reserved if it is new."""
        if index > len(self._buffers):
            self._buffers.append(self._bucket.storage.partial_sum(index, self._numel, self._bucket.device))
        rest = self._rest if index == 0 else self._buffers[index - 1]
        with rest.opened(write=write, load=load) as total:
            yield total if index else total[self._offset : self._offset + self._numel]

    def _push(self, part: Tensor) -> None:
        if self._levels[-1] > 0:
            with self._opened(len(self._levels), write=True, load=False) as new:
                new.copy_(part)
            self._levels.append(0)
            return
        with self._opened(len(self._levels) - 1, write=True) as top:
            top.add_(part.to(top.device))
        self._levels[-1] = 1
        while len(self._levels) > 1 and self._levels[-1] == self._levels[-2]:
            self._merge()

    def _merge(self) -> None:
        top = len(self._levels) - 1
        with self._opened(top - 1, write=True) as lower, self._opened(top) as upper:
            lower.add_(upper)
        self._levels.pop()
        self._levels[-1] += 1

    def _merge_all(self) -> None:
        while len(self._levels) > 1:
            self._merge()
