"""Tensors on huge pages: the allocator of optimizer states and I/O buffers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_core import _native


@dataclass(frozen=True)
class ArenaStats:
    """What the arena of this process holds."""

    reserved_bytes: int
    """Address space taken from the system, in whole slabs of huge pages."""
    in_use_bytes: int
    """Held by living tensors, each rounded up to 64 bytes."""
    num_blocks: int
    """Living blocks."""
    huge_pages: bool
    """Whether the system accepted the advice to use huge pages for every slab."""


def empty(size: int | Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """A CPU tensor with undefined contents, 64-byte aligned, in memory advised to 2 MiB pages.

    `size` is a number of elements or a shape. The memory goes back to the arena with the last tensor that views it.
    Where the native module is absent this is `torch.empty`.
    """
    shape = (size,) if isinstance(size, int) else tuple(size)
    numel = math.prod(shape)
    if numel == 0 or not _native.has_native():
        return torch.empty(shape, dtype=dtype)
    block = _native.core.Block(numel * dtype.itemsize)
    return torch.frombuffer(block, dtype=dtype, count=numel).view(shape)


def zeros(size: int | Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """`empty`, filled with zeros."""
    return empty(size, dtype).zero_()


def stats() -> ArenaStats:
    """Counts of the whole process; all zero where the native module is absent."""
    if not _native.has_native():
        return ArenaStats(0, 0, 0, False)
    return ArenaStats(*_native.core.arena_stats())
