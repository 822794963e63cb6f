"""Large pages for memory that is frequently allocated and freed.

[Note: large pages]
Every page of new memory costs a fault when it is first written: for a gathered unit of 12 MB three thousand, twice a
step. Linux takes pages of 2 MB where it is asked to. Only whole large pages inside the tensor are asked for, all of
which are about to be filled, so no memory is used beyond what the tensor has.
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
    """Ask for large pages for new CPU memory, [Note: large pages]; returns `tensor`. Whether there are any is up to the
    system.
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
