"""Large pages for memory that is frequently allocated and freed.

[Note: large pages]
The first write to each page of new memory causes a page fault: with pages of 4 KiB three thousand for a gathered unit
of 12 MB, twice per step. Linux uses pages of 2 MB for memory that `madvise(MADV_HUGEPAGE)` selects. Only large pages
that lie completely inside the tensor are selected. All of the tensor is about to be written, so this needs no more
memory.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

from torch import Tensor

from ds_zero.tensors.storage import is_fake

_LARGE = 1 << 21
"""Bytes of a large page on x86-64, and on ARM with pages of 4 KiB."""


@functools.cache
def _advise() -> Callable[..., int] | None:
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):
        return None
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise


def in_large_pages(tensor: Tensor) -> Tensor:
    """Requests large pages for new CPU memory, [Note: large pages], and returns `tensor`. The system may ignore the
    request.
    """
    advise, advice = _advise(), getattr(mmap, "MADV_HUGEPAGE", None)
    if advise is None or advice is None or tensor.device.type != "cpu" or is_fake(tensor):
        return tensor
    storage = tensor.untyped_storage()
    begin = -(-storage.data_ptr() // _LARGE) * _LARGE
    end = (storage.data_ptr() + storage.nbytes()) // _LARGE * _LARGE
    if begin < end:
        advise(begin, end - begin, advice)
    return tensor
