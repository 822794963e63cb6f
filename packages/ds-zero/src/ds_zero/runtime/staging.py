"""Staging buffers: the memory that holds tensors that are away while they are open."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ds_zero.interfaces import MakesStaging, ShardStore

NUM_BUFFERS = 5
"""Buffers of each kind: one bucket's is in use, two are being loaded, and two are being stored. With three, loads wait
for stores: a step of 50 million parameters on a disk took 1.2 times as long (docs/benchmarks/offload.md).
"""
NUM_GRADS = 2
"""Maximum number of reduced gradients that the store is adding at a time."""


class Settles(Protocol):
    """A tensor with an operation of the store in progress."""

    def settle(self) -> None:
        """Waits until the operation has finished."""


BufferKind = tuple[str, torch.dtype]
"""Kind of tensor ("param", "master", "grad") and dtype."""


class Staging:
    """Buffers for the tensors of one model that are away, at most `NUM_BUFFERS` of each kind.

    They are allocated at their first use and kept until `close`, since allocating pinned memory is slow.
    """

    def __init__(self, store: ShardStore, device: torch.device, sizes: Mapping[BufferKind, int]) -> None:
        """`sizes` maps each kind to the number of elements of its largest tensor."""
        self._store, self._device, self._sizes = store, device, dict(sizes)
        self._free: dict[BufferKind, list[Tensor]] = {kind: [] for kind in sizes}
        self._made: dict[BufferKind, list[Tensor]] = {kind: [] for kind in sizes}
        self._storing: dict[BufferKind, deque[Settles]] = {kind: deque() for kind in sizes}
        self._grads: deque[Settles] = deque()

    def take(self, kind: BufferKind) -> Tensor:
        """Returns a buffer with undefined values. If all are in use, waits until the store has written one of them."""
        free, made, storing = self._free[kind], self._made[kind], self._storing[kind]
        while not free and len(made) >= NUM_BUFFERS and storing:
            storing.popleft().settle()
        if not free:
            free.append(self._make(kind))
            made.append(free[0])
        return free.pop()

    def give(self, kind: BufferKind, buffer: Tensor) -> None:
        """Returns `buffer`, which is no longer used."""
        self._free[kind].append(buffer)

    def note_storing(self, kind: BufferKind, owner: Settles) -> None:
        """Notes that the store is writing the values of a buffer, which `owner.settle` will return."""
        storing = self._storing[kind]
        if owner in storing:
            storing.remove(owner)
        storing.append(owner)

    def limit_grads(self, owner: Settles) -> None:
        """Notes that the store is adding a reduced gradient, which is kept alive until `owner` is settled. Waits for
        the oldest ones if there are more than `NUM_GRADS`.
        """
        self._grads.append(owner)
        while len(self._grads) > NUM_GRADS:
            self._grads.popleft().settle()

    def num_bytes(self, kind: str) -> int:
        """Bytes of the buffers of one kind that are allocated now."""
        return sum(buffer.nbytes for key, made in self._made.items() if key[0] == kind for buffer in made)

    def device_of(self, kind: BufferKind) -> torch.device:
        """Returns the device of the buffers of one kind."""
        if not self._made[kind]:
            self.give(kind, self.take(kind))
        return self._made[kind][0].device

    def is_on(self, kind: BufferKind, device: torch.device) -> bool:
        """Whether the buffers of one kind are on `device`. In a simulation of an accelerator, both are fake."""
        return self.device_of(kind) == device and not getattr(self._store, "simulates_accelerator", False)

    def close(self) -> None:
        """Frees all buffers, none of which may be in use."""
        for kind in self._sizes:
            self._free[kind].clear()
            self._made[kind].clear()
            self._storing[kind].clear()
        self._grads.clear()

    def _make(self, kind: BufferKind) -> Tensor:
        numel, dtype = self._sizes[kind], kind[1]
        if isinstance(self._store, MakesStaging):
            made = self._store.staging(numel, dtype, self._device)
            if made.shape != (numel,) or made.dtype != dtype:
                raise ValueError(
                    f"{type(self._store).__name__}.staging returned a tensor of shape {tuple(made.shape)} and dtype "
                    f"{made.dtype}, but shape ({numel},) and dtype {dtype} were requested"
                )
            return made
        return torch.empty(numel, dtype=dtype, device=self._device)
