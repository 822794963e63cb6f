"""A new file that is written sequentially, and is on the disk when it is closed.

[Note: direct writes] Large files are written by direct I/O (O_DIRECT) if the file system supports it. Otherwise the
page cache would fill with data that is not read again, and the disk would be idle until `fsync`. Direct I/O needs
aligned memory, so bytes are copied to a few buffers (`buffers.py`): a thread writes one while the next one is filled.
The remainder of less than a page is written through the cache. On other file systems the whole file is written through
the cache, which is flushed to the disk in small steps.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from torch import Tensor

from ds_checkpoint.disk import buffers
from ds_checkpoint.disk.buffers import Bytes

LARGE_BYTES = 16 << 20
"""Smaller files are written without a thread."""
FLUSH_BYTES = 8 << 20
"""Number of bytes that are flushed at a time if the page cache is used."""
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)


class OutFile:
    """A context manager; leaving it without an error completes the file and syncs it."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        """Creates the file, which must not exist. `num_bytes` is its expected size."""
        self._written = self._flushed = 0
        self._descriptor, direct = _open(path, large=num_bytes >= LARGE_BYTES)
        self._past = _PastCache(self._descriptor) if direct else None

    def __enter__(self) -> OutFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self._past is not None:
                self._past.end(complete=kind is None)
            if kind is None:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def write(self, content: bytes | Tensor) -> None:
        """Appends bytes, or the contents of a contiguous 1-D uint8 CPU tensor, which may be changed afterwards.

        Raises:
            OSError: this or an earlier write failed, for example because the disk is full.
        """
        raw: Bytes = np.frombuffer(content, dtype=np.uint8) if isinstance(content, bytes) else content.numpy()
        if self._past is not None:
            self._past.write(raw)
            return
        for begin in range(0, raw.nbytes, FLUSH_BYTES):
            part = raw[begin : begin + FLUSH_BYTES]
            _write_all(self._descriptor, part)
            self._written += part.nbytes
            if self._written - self._flushed >= FLUSH_BYTES:
                _start_flush(self._descriptor, self._flushed, self._written - self._flushed)
                self._flushed = self._written


class _PastCache:
    """[Note: direct writes]"""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._buffers = buffers.take()
        self._free = list(self._buffers)
        self._busy: deque[tuple[Bytes, Future[None]]] = deque()
        self._current = self._free.pop()
        self._fill = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ds-checkpoint-disk")

    def write(self, content: Bytes) -> None:
        size = self._current.nbytes
        if self._fill == 0 and content.nbytes >= size and _address(content) % mmap.PAGESIZE == 0:
            self._wait()
            whole = content.nbytes // mmap.PAGESIZE * mmap.PAGESIZE
            _write_all(self._descriptor, content[:whole])  # without a copy
            content = content[whole:]
        while content.nbytes:
            taken = min(content.nbytes, size - self._fill)
            np.copyto(self._current[self._fill : self._fill + taken], content[:taken])
            self._fill += taken
            content = content[taken:]
            if self._fill == size:
                full = self._current
                self._busy.append((full, self._thread.submit(_write_all, self._descriptor, full)))
                if not self._free:
                    self._wait(all_but=len(self._busy) - 1)
                self._current = self._free.pop()
                self._fill = 0

    def _wait(self, all_but: int = 0) -> None:
        """Waits until at most `all_but` buffers are being written."""
        while len(self._busy) > all_but:
            buffer, done = self._busy.popleft()
            self._free.append(buffer)
            done.result()

    def end(self, *, complete: bool) -> None:
        """Writes the remainder if `complete`. The thread has ended when this returns or raises."""
        try:
            if complete:
                self._wait()
                _use_cache(self._descriptor)
                _write_all(self._descriptor, self._current[: self._fill])
        finally:
            self._thread.shutdown(cancel_futures=True)
            buffers.give(self._buffers)


def _address(content: Bytes) -> int:
    return int(content.__array_interface__["data"][0])


def _open(path: Path, *, large: bool) -> tuple[int, bool]:
    """Returns a descriptor, and whether it uses direct I/O."""
    direct = getattr(os, "O_DIRECT", 0) if large else 0
    if direct:
        try:
            return os.open(path, _FLAGS | direct, 0o644), True
        except OSError as error:
            if error.errno != errno.EINVAL:  # this file system does not support O_DIRECT
                raise
            path.unlink(missing_ok=True)  # some file systems create the file before they refuse
    return os.open(path, _FLAGS, 0o644), False


def _use_cache(descriptor: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)


def _write_all(descriptor: int, content: Bytes) -> None:
    while content.nbytes:
        try:
            content = content[os.write(descriptor, content.data) :]
        except OSError as error:
            # Some file systems take O_DIRECT and refuse its writes; and after a short write nothing is aligned.
            if error.errno != errno.EINVAL or not _goes_past_cache(descriptor):
                raise
            _use_cache(descriptor)


def _goes_past_cache(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))


def _start_flush(descriptor: int, begin: int, length: int) -> None:
    """Makes the system start to write a range to the disk, without waiting."""
    if hasattr(os, "posix_fadvise"):
        # Linux starts writeback for pages that are marked as not needed; it does not drop dirty pages.
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, begin, length, os.POSIX_FADV_DONTNEED)
