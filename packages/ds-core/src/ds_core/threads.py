"""How many threads the CPU kernels use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch

_LIMIT: ContextVar[int | None] = ContextVar("ds_core.threads", default=None)


@cache
def _of_environment() -> int | None:
    text = os.environ.get("DS_CPU_THREADS", "")
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"DS_CPU_THREADS is {text!r}: it must be a number of threads, at least 1")
    return int(text)


def count() -> int:
    """Returns the number of threads for a kernel: `torch.get_num_threads()`, but no more than the limit of `limited`,
    or else of the environment variable DS_CPU_THREADS, which is read once.
    """
    limit = _LIMIT.get()
    if limit is None:
        limit = _of_environment()
    most = torch.get_num_threads()
    return most if limit is None else min(limit, most)


@contextmanager
def limited(num_threads: int | None) -> Iterator[None]:
    """Context manager within which kernels that this thread calls use at most `num_threads` threads; None: no change.
    The other cores are free, for example for the workers of a data loader. Results have the same bits.
    """
    if num_threads is None:
        yield
        return
    token = _LIMIT.set(num_threads)
    try:
        yield
    finally:
        _LIMIT.reset(token)
