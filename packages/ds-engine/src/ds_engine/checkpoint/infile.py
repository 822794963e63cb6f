"""Reading files from their beginning to their end, ahead of who asks.

[Note: read ahead] A thread reads pieces into a few buffers, past the page cache where the file system can (O_DIRECT)
and the cache does not have them already: the disk then writes to where the checksum is taken, while the piece before
is checked and copied to its place. How far the thread is ahead grows with every request that begins where the last one
ended, as files are mostly read; a request elsewhere reads what it asked for and no more.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ds_engine.checkpoint import buffers
from ds_engine.checkpoint.buffers import Bytes

LITTLE_BYTES = 1 << 17
"""A request elsewhere that is not larger leaves what was read ahead alone: numbers lie apart from the tensors."""


class InFile:
    """An open file."""

    def __init__(self, path: Path) -> None:
        """OSError if it cannot be opened."""
        self._path = path
        self._cached = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._direct = -1
        self._has_direct = hasattr(os, "O_DIRECT")
        self.num_bytes = os.fstat(self._cached).st_size

    def rest(self) -> None:
        """Nothing of it is being read, and perhaps nothing will be: a process can have so many files open."""
        if self._direct >= 0:
            os.close(self._direct)
            self._direct = -1

    def close(self) -> None:
        """Nothing of it is being read ahead any more. Safe to call twice."""
        self.rest()
        if self._cached >= 0:
            os.close(self._cached)
            self._cached = -1

    def read(self, begin: int, room: Bytes, *, past_cache: bool = False) -> int:
        """Fill `room` with what lies from `begin` on; how many bytes there were before the end of the file.

        Args:
            past_cache: begin, room and its size are multiples of a page.
        """
        done = 0
        if past_cache and self._has_direct and not _is_cached(self._cached, begin, room.nbytes):
            try:
                if self._direct < 0:
                    self._direct = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
                done = os.preadv(self._direct, [room.data], begin)
            except OSError as error:  # some file systems do not open it so, or open it and do not read it
                if error.errno != errno.EINVAL:
                    raise
                self._has_direct = False
        while done < room.nbytes and begin + done < self.num_bytes:
            got = os.preadv(self._cached, [room[done:].data], begin + done)
            if got == 0:
                break
            done += got
        return done


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Bytes [begin, end) of the file, once they are there."""

    begin: int
    end: int
    room: Bytes
    done: Future[int]


class ReadAhead:
    """Reads from one file at a time, and goes on where it was when another was read in between."""

    def __init__(self) -> None:
        self._file: InFile | None = None
        self._queue: deque[_Piece] = deque()
        self._buffers: list[Bytes] = []
        self._free: list[Bytes] = []
        self._thread: ThreadPoolExecutor | None = None
        self._expected = -1
        """Where the next request begins if files are read in order."""
        self._streak = 0
        """Requests in a row that did."""

    def close(self) -> None:
        """The thread has ended, and no file of others is in use; safe to call twice."""
        self._turn_to(None)
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
            buffers.give(self._buffers)
            self._buffers = self._free = []

    def views(self, file: InFile, begin: int, end: int) -> Iterator[Bytes]:
        """Bytes [begin, end) of a file, in order; each view is good until the next is asked for. They end early where
        the file does.

        Raises:
            OSError: the system cannot read it.
        """
        here = file is self._file and begin == self._expected
        if not here and end - begin <= LITTLE_BYTES and not self._has(file, begin):
            room = np.empty(end - begin, dtype=np.uint8)
            yield room[: file.read(begin, room)]
            return
        if file is not self._file:
            self._turn_to(file)
        self._streak = self._streak + 1 if here else 0
        self._expected = end
        limit = min(end + min(self._streak, buffers.NUM_BUFFERS - 1) * buffers.BUFFER_BYTES, file.num_bytes)
        while begin < end:
            piece = self._piece(file, begin, limit)
            try:
                there = piece.begin + piece.done.result()
            except OSError:
                self._drop()  # who asks again tries again
                raise
            last = min(end, there)
            if last <= begin:
                return
            yield piece.room[begin - piece.begin : last - piece.begin]
            begin = last

    def _has(self, file: InFile, at: int) -> bool:
        """Whether that byte is read already, or will be."""
        return file is self._file and bool(self._queue) and self._queue[0].begin <= at < self._queue[-1].end

    def _piece(self, file: InFile, at: int, limit: int) -> _Piece:
        """The one that holds the byte `at`; up to `limit` others are on their way."""
        if not self._has(file, at):
            self._drop()
        while self._queue and self._queue[0].end <= at:
            self._retire()
        following = self._queue[-1].end if self._queue else at // mmap.PAGESIZE * mmap.PAGESIZE
        while following < limit and len(self._queue) < buffers.NUM_BUFFERS:
            size = min(buffers.BUFFER_BYTES, -(-(limit - following) // mmap.PAGESIZE) * mmap.PAGESIZE)
            self._start(file, following, size)
            following += size
        return self._queue[0]

    def _start(self, file: InFile, begin: int, size: int) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="ds-checkpoint-disk")
            self._buffers = buffers.take()
            self._free = list(self._buffers)
        room = self._free.pop()
        done = self._thread.submit(file.read, begin, room[:size], past_cache=True)
        self._queue.append(_Piece(begin=begin, end=begin + size, room=room, done=done))

    def _retire(self) -> None:
        """The first piece's room can be used again."""
        piece = self._queue.popleft()
        if not piece.done.cancel():
            with suppress(OSError):  # of bytes that nobody has asked for
                piece.done.result()
        self._free.append(piece.room)

    def _turn_to(self, file: InFile | None) -> None:
        self._drop()
        if self._file is not None:
            self._file.rest()
        self._file = file

    def _drop(self) -> None:
        while self._queue:
            self._retire()


def _is_cached(descriptor: int, begin: int, size: int) -> bool:
    """Whether the page cache has all of these bytes, as far as the system tells."""
    mincore = getattr(_LIBC, "mincore", None)
    if mincore is None:
        return False
    try:
        size = max(min(size, os.fstat(descriptor).st_size - begin), 1)
        pages = mmap.mmap(descriptor, size, prot=mmap.PROT_READ, offset=begin)
    except (OSError, ValueError):  # no such thing on this file system, or the file ends before
        return False
    with pages:
        there = np.zeros(-(-size // mmap.PAGESIZE), dtype=np.uint8)
        mapped = np.frombuffer(pages, dtype=np.uint8)
        address = ctypes.c_void_p(mapped.__array_interface__["data"][0])
        failed = mincore(address, ctypes.c_size_t(size), ctypes.c_void_p(there.ctypes.data))
        del mapped  # or the mapping could not be closed
    return not failed and bool((there & 1).all())


_LIBC = ctypes.CDLL(None)
