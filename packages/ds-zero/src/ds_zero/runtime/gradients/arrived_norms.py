"""Sums of squares of this rank's reduced gradients, computed while they are in memory if possible.

[Note: norm at arrival]
A gradient that is away would have to be loaded for its norm alone. So the sum of squares of its bucket is computed from
the last values that are given to the store, before they leave memory. It is the number that would be computed from the
loaded values, bit for bit. Norms and overflow checks use it until torch writes the gradient again (`Resting.stamp`). If
another set of parameters has a gradient by then, the bucket is loaded after all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ds_zero.interfaces import Norms
from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.storage import GRAD, visit


@dataclass(frozen=True)
class _Noted:
    """A sum of squares, and the gradient to which it belongs."""

    square: float
    stamp: tuple[int, ...]


class ArrivedNorms:
    """Computes and remembers the sums of squares of buckets, [Note: norm at arrival]."""

    def __init__(self, norms: Norms, *, in_memory: bool = False) -> None:
        """
        Args:
            in_memory: also for gradients in host memory, because a step waits for the norm, [Note: early steps].
        """
        self._norms, self._in_memory = norms, in_memory
        self._noted: dict[int, _Noted] = {}
        self._fresh: list[Bucket] = []
        """Buckets whose sums of squares were noted since the last `end_arrivals`."""

    def wanted(self, bucket: Bucket) -> bool:
        """Whether the sum of squares should be computed when the bucket's gradient arrives."""
        grad = bucket.storage.addressable(GRAD)
        return grad is None or (self._in_memory and grad.device.type == "cpu")

    def forget(self, bucket: Bucket) -> None:
        """Forgets the sum of squares, because the gradient is going to be written."""
        self._noted.pop(id(bucket), None)

    def square_of(self, bucket: Bucket, values: Tensor) -> float:
        """Returns the sum of squares of this rank's part of a bucket's gradients, in which all parameters have one.

        Args:
            values: this rank's slice, in the dtype in which gradients are stored.
        """
        first = bucket.slice_range[0]
        pieces = [
            values[low - first : high - first] for _, low, high in _counted(bucket, *bucket.slice_range)
        ]
        return self._norms(pieces)[0]

    def note(self, bucket: Bucket, square: float) -> None:
        """Remembers the result of `square_of`, after the same values were given to the store."""
        self._noted[id(bucket)] = _Noted(square, bucket.storage.rest(GRAD).stamp())
        self._fresh.append(bucket)

    def end_arrivals(self) -> None:
        """Called when all gradients of a backward have arrived. Tensors in one memory share a version, which the
        arrival of each has changed.
        """
        fresh, self._fresh = self._fresh, []
        for bucket in fresh:
            if id(bucket) in self._noted:
                stamp = bucket.storage.rest(GRAD).stamp()
                self._noted[id(bucket)] = replace(self._noted[id(bucket)], stamp=stamp)

    def noted(self, bucket: Bucket) -> float | None:
        """Returns the sum of squares of the present gradient; None if it must be computed."""
        noted = self._noted.get(id(bucket))
        if noted is None or noted.stamp != bucket.storage.rest(GRAD).stamp():
            return None
        if any(bucket.shards[index].grad is None for index, _, _ in _counted(bucket, *bucket.slice_range)):
            return None
        return noted.square

    def total(self, buckets: Sequence[Bucket], *, unreduced: bool) -> float:
        """Returns the sum of squares of this rank's part of all gradients. The parts of all ranks are disjoint and
        cover the gradients, also in stage 0, where every rank holds all of them.

        Args:
            unreduced: gradients have not been reduced, so that those of ranks differ, and each rank counts all of its
                own.
        """
        trainable = [b for b in buckets if b.trainable]
        squares = [None if unreduced else self.noted(bucket) for bucket in trainable]
        missing = [b for b, square in zip(trainable, squares, strict=True) if square is None]
        addressable: dict[torch.device, list[Tensor]] = {}  # a store may keep some of them on the host
        for bucket in missing:
            grad = bucket.storage.addressable(GRAD)
            if grad is not None:
                addressable.setdefault(grad.device, []).extend(_pieces(bucket, unreduced))
        found = [self._norms(pieces)[0] for pieces in addressable.values()]
        with closing(visit([b for b in missing if b.storage.is_away(GRAD)], (GRAD,))) as visited:
            found += [self._norms(_pieces(bucket, unreduced))[0] for bucket in visited]
        found += [square for square in squares if square is not None]
        return found[0] if len(found) == 1 else math.fsum(found)


def _counted(bucket: Bucket, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yields (index, first element, last element + 1) of each parameter that this rank counts in norms, within a range
    of the bucket's elements.
    """
    for index, (slot, counted) in enumerate(zip(bucket.layout.slots, bucket.counted, strict=True)):
        low, high = max(slot.offset, begin), min(slot.end, end)
        if high > low and counted:
            yield index, low, high


def _pieces(bucket: Bucket, unreduced: bool) -> list[Tensor]:
    """Returns this rank's part of each gradient of a bucket. If they are away, they must be open."""
    first = bucket.owned_range[0]
    counted = _counted(bucket, *(bucket.owned_range if unreduced else bucket.slice_range))
    with bucket.storage.opened(GRAD) as grad:
        return [
            grad[low - first : high - first]
            for index, low, high in counted
            if bucket.shards[index].grad is not None
        ]
