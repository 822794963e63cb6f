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
    """Memory counts of the arena of this process."""

    reserved_bytes: int
    """Address space taken from the system, in whole slabs of huge pages."""
    in_use_bytes: int
    """Bytes of live tensors, each rounded up to 64 bytes."""
    num_blocks: int
    """Number of live blocks."""
    huge_pages: bool
    """Whether the system accepted the advice to use huge pages for every slab."""


def empty(size: int | Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns a CPU tensor with undefined contents, in memory for which 2 MiB pages were requested.

    It is aligned to 64 bytes, and from 64 KiB on to pages of 4 KiB, as direct I/O needs it.

    `size` is a number of elements or a shape. The memory returns to the arena with the last tensor that views it.
    Without the native module this is `torch.empty`.

    Raises:
        MemoryError: the system has no more memory for this process.
    """
    shape = (size,) if isinstance(size, int) else tuple(size)
    numel = math.prod(shape)
    if numel == 0 or not _native.has_native():
        return torch.empty(shape, dtype=dtype)
    try:
        block = _native.core.Block(numel * dtype.itemsize)
    except MemoryError:
        raise MemoryError(
            f"cannot allocate {numel * dtype.itemsize:,} bytes of host memory for a tensor of {numel:,} elements "
            f"({dtype}); the arena of this process holds {stats().in_use_bytes:,} bytes already. Raise the limit of "
            "the process or its cgroup, or keep less state in host memory"
        ) from None
    return torch.frombuffer(block, dtype=dtype, count=numel).view(shape)


def zeros(size: int | Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """`empty`, filled with zeros."""
    return empty(size, dtype).zero_()


def stats() -> ArenaStats:
    """Returns the counts of the whole process; all are zero without the native module."""
    if not _native.has_native():
        return ArenaStats(0, 0, 0, False)
    return ArenaStats(*_native.core.arena_stats())
