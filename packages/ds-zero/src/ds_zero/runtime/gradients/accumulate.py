"""Reduced gradients of one bucket, added up over micro-batches.

[Note: tree over micro-batches]
Floating-point sums depend on the order of additions. Let micro-batch g = k W + r be the k-th of rank r, for W ranks. A
reduction adds the W micro-batches of one k in a binary tree over r. This module adds the results for k = 0, 1, ... like
a binary counter: two sums of 2^j reductions are merged into one of 2^(j+1). If W is a power of two, both trees together
form one tree over g that does not depend on W. So the same micro-batches on 1, 2, 4 or 8 ranks give the same bits. At
most log2(k) partial sums exist besides the newest; the first is stored in the gradient itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ds_zero.comm.collectives import Comm
from ds_zero.layout.buckets import piece_of
from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.gradients.arrived_norms import ArrivedNorms
from ds_zero.runtime.resting import Resting
from ds_zero.runtime.storage import GRAD
from ds_zero.tensors.storage import same_place


class Sums:
    """Adds reduced slices to the bucket's stored gradient, in order or in [Note: tree over micro-batches]."""

    def __init__(self, bucket: Bucket, *, tree: bool, norms: ArrivedNorms) -> None:
        self._bucket, self._tree, self._norms = bucket, tree, norms
        self._rest = bucket.storage.rest(GRAD)
        self._levels: list[int] = []
        """Height of the tree of each partial sum; sum 0 is in the stored gradient, sum i in `_buffers[i - 1]`."""
        self._buffers: list[Resting] = []
        """Reserved at their first use, then kept."""
        self._whole = bucket.layout.by_rows
        """Whether a reduction gives the whole bucket on every rank, [Note: gradients by rows], instead of a slice."""
        begin, end = bucket.owned_range if self._whole else bucket.slice_range
        self._offset = begin - bucket.owned_range[0]
        self._numel = end - begin
        self.is_complete = True
        """Whether the stored gradient is the whole sum, see `complete`."""
        self._in_memory: Tensor | None = None
        """See `take_in_memory`."""

    def prefetch(self) -> None:
        """Starts to load the stored gradient, if the next `add(measure=True)` needs it in memory."""
        if self._norms.wanted(self._bucket) and self._adds_to_stored():
            self._rest.prefetch()

    def _adds_to_stored(self) -> bool:
        has_all = all(s.grad is not None for s in self._bucket.shards if s.numel())
        return has_all and (not self._tree or len(self._levels) == 1)

    def add(self, part: Tensor, *, measure: bool = False) -> None:
        """Adds the result of one reduction: this rank's slice, or the whole bucket for [Note: gradients by rows].
        Entries whose gradient is None start a new accumulation.

        Args:
            measure: this may be the last addition before the step, [Note: norm at arrival].
        """
        bucket = self._bucket
        self._norms.forget(bucket)
        self._in_memory = None
        zeroed = self._rest.take_zeroed()
        kept = [s.grad is not None and i not in zeroed for i, s in enumerate(bucket.shards) if s.numel()]
        if not kept:
            return
        part = self._without_loan(part, is_first=not any(kept))
        measure = measure and self._norms.wanted(bucket)
        if not any(kept):
            self._levels = [0]
            self._put_first(part, measure)
        elif not all(kept):
            self._merge_all(measure=False)
            self._put_each(part, zeroed)
        elif self._tree:
            self._push(part, measure)
        elif measure:
            self._add_in_memory(part)
        else:
            self._put(part, 0, accumulate=True)
        self.is_complete = len(self._levels) == 1 and not self._needs_gather
        for shard, grad in zip(bucket.shards, bucket.storage.grads, strict=True):
            if shard.grad is None and shard.numel():
                shard.grad = grad

    def add_own(self, whole: Tensor) -> None:
        """Adds this rank's own gradient without a reduction. The rank must own the whole bucket."""
        storage = self._bucket.storage
        for shard, grad, part in zip(storage.shards, storage.grads, storage.cut(whole), strict=True):
            if shard.grad is None:
                grad.copy_(part)
                shard.grad = grad
            else:
                shard.grad.add_(part.to(grad.device))

    def output(self) -> Tensor | None:
        """Returns the fp32 memory into which the next slice may be reduced directly; None if it must be added to an
        earlier one, or the stored gradient has another dtype or device.
        """
        bucket = self._bucket
        if bucket.storage.kinds.reserved[GRAD] != torch.float32 or any(
            s.grad is not None for s in bucket.shards
        ):
            return None
        away = self._rest.tensor is None
        if away and self._numel != bucket.owned_range[1] - bucket.owned_range[0]:
            return None
        grad = self._rest.lend(bucket.device)
        return grad[self._offset : self._offset + self._numel] if grad is not None else None

    def drop_output(self) -> None:
        """Called if nothing was reduced into `output`."""
        self._rest.take_back()

    def complete(self, comm: Comm) -> None:
        """Completes the entries' gradients: merges partial sums and, in stage 0, gathers the other ranks' slices."""
        if self.is_complete:
            return
        bucket = self._bucket
        measure = self._norms.wanted(bucket)
        self._in_memory = None
        self._merge_all(measure=measure)
        if self._needs_gather:
            square = None
            with self._rest.opened(write=True) as grad:
                comm.gather(grad, bucket.ranks).wait()
                if measure:
                    square = self._norms.square_of(bucket, grad[self._offset : self._offset + self._numel])
                    self._in_memory = grad
            self._note(square)
        self.is_complete = True

    def take_in_memory(self) -> Tensor | None:
        """Returns the stored gradient over the owned range, if the last addition was measured and left it in memory. It
        may be read until anything else is done with the bucket. This object does not keep it any longer.
        """
        values, self._in_memory = self._in_memory, None
        return values

    def so_far(self) -> Tensor:
        """Returns a copy of this rank's slice of the sum so far; undefined where an entry has no gradient."""
        top = max(len(self._levels) - 1, 0)
        with self._opened(top) as last:
            total = last.clone()
        for index in reversed(range(top)):  # as `_merge_all` adds them
            with self._opened(index) as lower:
                total += lower
        return self._bucket.slice_of(total) if self._whole else total

    def settle(self) -> None:
        """Waits until the store has added all results, except those in buffers of the stored gradient, which wait
        themselves.
        """
        self._rest.settle_puts()

    def partial_sums(self) -> list[Tensor]:
        """Returns the memory of partial sums, without the stored gradient."""
        return [buffer.tensor for buffer in self._buffers if buffer.tensor is not None]

    @property
    def _needs_gather(self) -> bool:
        """Whether every rank owns the whole gradient, but has only its slice of the sum (stage 0)."""
        return self._bucket.layout.num_owners != self._bucket.ranks.size and not self._whole

    def _without_loan(self, part: Tensor, *, is_first: bool) -> Tensor:
        """Returns the result of a reduction, in memory of its own if it was reduced into a lent buffer, but is not
        going to be stored as it is.
        """
        lent = self._rest.lent
        if lent is None or (is_first and same_place(lent, part)):
            return part
        if same_place(lent, part):
            part = part.clone()
        self._rest.take_back()
        return part

    def _put(self, part: Tensor, begin: int, *, accumulate: bool) -> None:
        offset, grad = self._offset + begin, self._rest.tensor
        if not accumulate and grad is not None and same_place(part, grad[offset:]):
            return  # it was reduced into this memory
        self._rest.abandon()
        self._rest.put_grad(part, offset=offset, accumulate=accumulate)

    def _put_first(self, part: Tensor, measure: bool) -> None:
        """Stores the first result of an accumulation."""
        grad = self._rest.tensor
        if measure and grad is None:
            part = self._rest.rounded(part)
        self._put(part, 0, accumulate=False)
        if not measure:
            return
        if grad is not None:
            self._rest.settle()
            part = grad[self._offset : self._offset + self._numel]
        self._note(self._norms.square_of(self._bucket, self._slice_of(part)))
        self._in_memory = grad if grad is not None else part

    def _add_in_memory(self, part: Tensor) -> None:
        """Adds as the store would, and measures the sum."""
        with self._opened(0, write=True) as total:
            total.add_(part.to(total.device))
            square = self._norms.square_of(self._bucket, self._slice_of(total))
        self._note(square)
        self._in_memory = total if self._rest.tensor is None else self._rest.tensor

    def _slice_of(self, values: Tensor) -> Tensor:
        return self._bucket.slice_of(values) if self._whole else values

    def _note(self, square: float | None) -> None:
        if square is not None:
            self._norms.note(self._bucket, square)

    def _put_each(self, part: Tensor, zeroed: frozenset[int]) -> None:
        """Adds to the entries that have a gradient, and sets it for the others."""
        first = self._bucket.owned_range[0] + self._offset
        for i, (shard, slot) in enumerate(zip(self._bucket.shards, self._bucket.layout.slots, strict=True)):
            piece = piece_of(slot, first, first + self._numel)
            if piece.numel:
                own = part[piece.offset : piece.offset + piece.numel]
                accumulate = shard.grad is not None and i not in zeroed
                self._put(own, piece.offset, accumulate=accumulate)

    @contextlib.contextmanager
    def _opened(self, index: int, *, write: bool = False, load: bool = True) -> Iterator[Tensor]:
        """Context manager that provides partial sum `index`; its buffer is reserved if it does not exist."""
        if index > len(self._buffers):
            self._buffers.append(self._bucket.storage.partial_sum(index, self._numel, self._bucket.device))
        rest = self._rest if index == 0 else self._buffers[index - 1]
        with rest.opened(write=write, load=load) as total:
            yield total if index else total[self._offset : self._offset + self._numel]

    def _push(self, part: Tensor, measure: bool) -> None:
        if self._levels[-1] > 0:
            with self._opened(len(self._levels), write=True, load=False) as new:
                new.copy_(part)
            self._levels.append(0)
            return
        if measure and len(self._levels) == 1:
            self._add_in_memory(part)
        else:
            with self._opened(len(self._levels) - 1, write=True) as top:
                top.add_(part.to(top.device))
        self._levels[-1] = 1
        while len(self._levels) > 1 and self._levels[-1] == self._levels[-2]:
            self._merge(measure)

    def _merge(self, measure: bool) -> None:
        top = len(self._levels) - 1
        square = None
        with self._opened(top - 1, write=True) as lower, self._opened(top) as upper:
            lower.add_(upper)
            if measure and top == 1:
                square = self._norms.square_of(self._bucket, self._slice_of(lower))
                self._in_memory = lower if self._rest.tensor is None else self._rest.tensor
        self._note(square)
        self._levels.pop()
        self._levels[-1] += 1

    def _merge_all(self, *, measure: bool) -> None:
        while len(self._levels) > 1:
            self._merge(measure)
