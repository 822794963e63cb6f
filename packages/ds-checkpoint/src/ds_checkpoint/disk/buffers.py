"""Buffers for direct I/O, which bypasses the page cache.

They use huge pages if the system has them: one request to a disk has at most some hundred memory segments, and every
small page is a segment. One set of buffers is kept for the next file, because the first access to new memory costs
more than the copy into it. A second user at the same time gets another set.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_core import arena

BUFFER_BYTES = 8 << 20
NUM_BUFFERS = 3
"""One buffer is being filled or emptied, one is being transferred, and one is ready, so that the disk never waits."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_kept: list[list[Bytes]] = []
"""At most one unused set of buffers."""


def take() -> list[Bytes]:
    """Returns `NUM_BUFFERS` page-aligned buffers of `BUFFER_BYTES` each."""
    try:
        buffers = _kept.pop()
    except IndexError:
        buffers = []
    if [buffer.nbytes for buffer in buffers] == NUM_BUFFERS * [BUFFER_BYTES]:
        return buffers
    return [buffer.numpy() for buffer in aligned(NUM_BUFFERS * BUFFER_BYTES).split(BUFFER_BYTES)]


def give(buffers: list[Bytes]) -> None:
    """Returns buffers that are no longer used."""
    if not _kept:
        _kept.append(buffers)


def aligned(num_bytes: int) -> Tensor:
    """Returns a 1-D uint8 tensor on huge pages, if available. It is page-aligned, as direct I/O requires."""
    room = arena.empty(num_bytes + mmap.PAGESIZE, torch.uint8)
    first = -room.data_ptr() % mmap.PAGESIZE
    return room[first : first + num_bytes]
