"""How many threads the CPU kernels use, and on which cores."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch

from ds_core import _native

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


@contextmanager
def bound(cores: Sequence[int] | None) -> Iterator[None]:
    """Context manager within which kernels that this thread calls compute on these cores only, with one thread a core
    at most; None: no change. torch's threads and the workers of a data loader are not bound. Results have the same
    bits.

    Args:
        cores: numbers of cores that this process may use, as `os.sched_getaffinity` returns them.

    Raises:
        ValueError: a core that this process may not use.
    """
    if cores is None:
        yield
        return
    own = sorted(os.sched_getaffinity(0))
    if not cores or not set(cores) <= set(own):
        raise ValueError(
            f"cores={list(cores)}: give at least one of the cores of this process, which are {own}"
        )
    if not _native.has_native():
        yield
        return
    before = _native.core.compute_on(cores)
    try:
        with limited(len(cores)):
            yield
    finally:
        _native.core.compute_on(before)
