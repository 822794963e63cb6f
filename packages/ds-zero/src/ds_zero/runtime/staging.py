"""Memory in which tensors that are away are used, and gradients on their way to the store."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ds_zero.interfaces import MakesStaging, ShardStore

NUM_BUFFERS = 3
"""Of each kind: one bucket's is used, the next one's is being loaded, the last one's is being stored."""
NUM_SINKING = 2
"""Reduced gradients that are held while the store takes them: one arrives, one is added."""


class Settles(Protocol):
    """A tensor at rest with a work under way."""

    def settle(self) -> None:
        """Return when the work is done."""


BufferKind = tuple[str, torch.dtype]
"""Kind of tensor ("param", "master", "grad") and dtype."""


class Staging:
    """Buffers for the tensors of one model that are away, at most `NUM_BUFFERS` of each kind.

    They are made on first use and kept until `close`, since pinned memory is costly to make.
    """

    def __init__(self, store: ShardStore, device: torch.device, sizes: Mapping[BufferKind, int]) -> None:
        """`sizes` has the number of elements of the largest tensor of each kind."""
        self._store, self._device, self._sizes = store, device, dict(sizes)
        self._free: dict[BufferKind, list[Tensor]] = {kind: [] for kind in sizes}
        self._made: dict[BufferKind, list[Tensor]] = {kind: [] for kind in sizes}
        self._leaving: dict[BufferKind, deque[Settles]] = {kind: deque() for kind in sizes}
        self._sinking: deque[Settles] = deque()

    def take(self, kind: BufferKind) -> Tensor:
        """A buffer with undefined values. Where all are in use, one whose values the store has not taken yet is waited
        for.
        """
        free, made, leaving = self._free[kind], self._made[kind], self._leaving[kind]
        while not free and len(made) >= NUM_BUFFERS and leaving:
            leaving.popleft().settle()
        if not free:
            free.append(self._make(kind))
            made.append(free[0])
        return free.pop()

    def give(self, kind: BufferKind, buffer: Tensor) -> None:
        """`buffer` is not used any more."""
        self._free[kind].append(buffer)

    def leave(self, kind: BufferKind, owner: Settles) -> None:
        """The store takes the values of a buffer, which `owner` gives when it is settled."""
        leaving = self._leaving[kind]
        if owner in leaving:
            leaving.remove(owner)
        leaving.append(owner)

    def sink(self, owner: Settles) -> None:
        """The store takes a reduced gradient, for which memory is held until `owner` is settled."""
        self._sinking.append(owner)
        while len(self._sinking) > NUM_SINKING:
            self._sinking.popleft().settle()

    def num_bytes(self, kind: str) -> int:
        """Bytes of the buffers of one kind that exist now."""
        return sum(buffer.nbytes for key, made in self._made.items() if key[0] == kind for buffer in made)

    def device_of(self, kind: BufferKind) -> torch.device:
        """Where the buffers of one kind lie."""
        if not self._made[kind]:
            self.give(kind, self.take(kind))
        return self._made[kind][0].device

    def close(self) -> None:
        """Let the memory go; nothing is in use."""
        for kind in self._sizes:
            self._free[kind].clear()
            self._made[kind].clear()
            self._leaving[kind].clear()
        self._sinking.clear()

    def _make(self, kind: BufferKind) -> Tensor:
        numel, dtype = self._sizes[kind], kind[1]
        if isinstance(self._store, MakesStaging):
            made = self._store.staging(numel, dtype, self._device)
            if made.shape != (numel,) or made.dtype != dtype:
                raise ValueError(
                    f"{type(self._store).__name__}.staging made a tensor of shape {tuple(made.shape)} and dtype "
                    f"{made.dtype}, and was asked for ({numel},) and {dtype}"
                )
            return made
        return torch.empty(numel, dtype=dtype, device=self._device)
