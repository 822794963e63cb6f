"""Memory that disks write from and read to, past the page cache.

It lies on huge pages where the system has them: a disk takes some hundred pieces of memory in one request, and of
small pages each is a piece. One set is kept for the next file, because memory that was never touched costs more than
the copy into it; whoever needs one while it is in use gets another.
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
"""One is being filled or emptied, one is at the disk, one waits, so that the disk need not."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_kept: list[list[Bytes]] = []
"""At most one set."""


def take() -> list[Bytes]:
    """`NUM_BUFFERS` of `BUFFER_BYTES`, each of which begins at a page."""
    try:
        found = _kept.pop()
    except IndexError:
        found = []
    if [buffer.nbytes for buffer in found] == NUM_BUFFERS * [BUFFER_BYTES]:
        return found
    return [buffer.numpy() for buffer in aligned(NUM_BUFFERS * BUFFER_BYTES).split(BUFFER_BYTES)]


def give(buffers: list[Bytes]) -> None:
    """Nobody uses them any more."""
    if not _kept:
        _kept.append(buffers)


def aligned(num_bytes: int) -> Tensor:
    """1-D uint8 on huge pages where there are such. It begins at a page, which is all that disks ask for."""
    room = arena.empty(num_bytes + mmap.PAGESIZE, torch.uint8)
    first = -room.data_ptr() % mmap.PAGESIZE
    return room[first : first + num_bytes]
