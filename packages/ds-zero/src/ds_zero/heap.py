"""The C library's heap, on which tensors in host memory live.

[Note: freed memory]
Every step makes and frees the same memory: gathered parameters, gradients, messages. glibc gives large blocks and
the end of the heap back to the system at once, and the next step pays for new pages: at stage 3 with 19 M parameters
15,000 page faults a step, an eighth of its time. So what a step frees is kept, up to the size of a few buckets; the
peak does not change. Whoever has set one of glibc's own variables (`MALLOC_TRIM_THRESHOLD_`, ...) has decided
otherwise.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_FROM_HEAP = 32 << 20
"""Bytes; glibc takes no more."""
_KEPT_BYTES = (64 << 20, 1 << 30)
"""At least and at most so many bytes are kept at the end of the heap."""
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


def _function(name: str) -> Callable[..., int] | None:
    """A function of the C library; None where it is not glibc."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def return_freed_memory() -> None:
    """Give freed pages back, once. glibc keeps freed memory that lies below something alive: after sharding 19 M
    parameters at stage 3 the process was 127 MB above its size with the model, with this 6 MB.
    """
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def keep_freed_memory(bucket_bytes: int) -> None:
    """From now on keep what a step frees, [Note: freed memory].

    Args:
        bucket_bytes: size of the largest bucket; several are alive at once, beside activations of such sizes.
    """
    tune = _function("mallopt")
    if tune is None or any(name in os.environ for name in _VARIABLES):
        return
    least, most = _KEPT_BYTES
    tune(_MMAP_THRESHOLD, _LARGEST_FROM_HEAP)
    tune(_TRIM_THRESHOLD, min(max(16 * bucket_bytes, least), most))
