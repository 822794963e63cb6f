"""Reads files ahead of their use.

[Note: read ahead] A thread reads pieces of files into a few buffers. It uses direct I/O (O_DIRECT) if the file system
supports it and the page cache does not contain the piece. Meanwhile the previous piece is checked and copied to its
destination. The reader announces all ranges in advance and in order: a rank reads many small ranges of other ranks'
files, and bytes read between them would be wasted.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from ds_checkpoint.disk import buffers
from ds_checkpoint.disk.buffers import Bytes

LITTLE_BYTES = 1 << 17
"""A single range of at most this size is read when it is requested: it is not worth a buffer."""


class InFile:
    """An open file."""

    def __init__(self, path: Path) -> None:
        """OSError if it cannot be opened."""
        self._path = path
        self._cached = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._direct = -1
        self._has_direct = hasattr(os, "O_DIRECT")
        self._in_cache = True
        """Cached result of the check, because the check takes time, too."""
        self.num_bytes = os.fstat(self._cached).st_size

    def rest(self) -> None:
        """Closes the descriptor until the next read, because the number of open files of a process is limited."""
        if self._direct >= 0:
            os.close(self._direct)
            self._direct = -1

    def close(self) -> None:
        """Closes the file. No read-ahead may be under way. Safe to call twice."""
        self.rest()
        if self._cached >= 0:
            os.close(self._cached)
            self._cached = -1

    def read(self, begin: int, room: Bytes, *, past_cache: bool = False) -> int:
        """Fills `room` from byte `begin` on. Returns the number of bytes read, which is less at the end of the file.

        Args:
            past_cache: use direct I/O; `begin`, the address of `room` and its size must be multiples of the page
                size.
        """
        done = 0
        if past_cache and self._in_cache:
            self._in_cache = _is_cached(self._cached, begin, room.nbytes)
        if past_cache and self._has_direct and not self._in_cache:
            try:
                if self._direct < 0:
                    self._direct = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
                done = os.preadv(self._direct, [room.data], begin)
            except OSError as error:  # some file systems refuse O_DIRECT on open, others only on read
                if error.errno != errno.EINVAL:
                    raise
                self._has_direct = False
        while done < room.nbytes and begin + done < self.num_bytes:
            got = os.preadv(self._cached, [room[done:].data], begin + done)
            if got == 0:
                break
            done += got
        return done


_Span = tuple[InFile, int, int]
"""Bytes [begin, end) of a file."""


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Bytes [begin, end) of a file that are being read or were read."""

    file: InFile
    begin: int
    end: int
    room: Bytes
    done: Future[int]


class ReadAhead:
    """Reads announced ranges of files in order, in a thread."""

    def __init__(self) -> None:
        self._plan: deque[_Span] = deque()
        """Announced ranges that are not being read yet."""
        self._queue: deque[_Piece] = deque()
        self._buffers: list[Bytes] = []
        self._free: list[Bytes] = []
        self._thread: ThreadPoolExecutor | None = None

    def close(self) -> None:
        """Ends the thread; afterwards no file is in use. Safe to call twice."""
        self._drop()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
            buffers.give(self._buffers)
            self._buffers = self._free = []

    def expect(self, spans: Iterable[_Span]) -> None:
        """Announces that bytes [begin, end) of these files will be requested, in this order, by one request or
        several.
        """
        self._drop()
        for file, begin, end in spans:
            last = self._plan[-1] if self._plan else None
            if last is not None and last[0] is file and last[1] <= begin <= last[2]:
                self._plan[-1] = (file, last[1], max(end, last[2]))
            elif end - begin > LITTLE_BYTES:
                self._plan.append((file, begin, end))

    def views(self, file: InFile, begin: int, end: int) -> Iterator[Bytes]:
        """Yields views of bytes [begin, end) of a file, in order. Each view is valid until the next is requested.
        They end early if the file does.

        Raises:
            OSError: the system cannot read it.
        """
        if not self._is_coming(file, begin):
            if self._plan or end - begin <= LITTLE_BYTES:
                yield from _at_once(file, begin, end)
                return
            self.expect([(file, begin, end)])
        while begin < end:
            piece = self._piece(file, begin)
            if piece is None:  # fewer bytes were announced
                yield from _at_once(file, begin, end)
                return
            try:
                there = piece.begin + piece.done.result()
            except OSError:
                self._drop()  # a new request tries again
                raise
            last = min(end, there)
            if last <= begin:
                return
            yield piece.room[begin - piece.begin : last - piece.begin]
            begin = last

    def _is_coming(self, file: InFile, at: int) -> bool:
        """Whether that byte was read or will be read."""
        pieces = ((piece.file, piece.begin, piece.end) for piece in self._queue)
        return any(other is file and low <= at < high for other, low, high in chain(pieces, self._plan))

    def _piece(self, file: InFile, at: int) -> _Piece | None:
        """Returns the piece that contains a byte, while others are being read; None if it was not announced."""
        if not self._is_coming(file, at):
            return None
        while True:
            while self._plan and len(self._queue) < buffers.NUM_BUFFERS:
                self._start()
            piece = self._queue[0]
            if piece.file is file and piece.begin <= at < piece.end:
                return piece
            self._retire()

    def _start(self) -> None:
        """Starts to read the next announced piece."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="ds-checkpoint-disk")
            self._buffers = buffers.take()
            self._free = list(self._buffers)
        file, begin, end = self._plan.popleft()
        begin = begin // mmap.PAGESIZE * mmap.PAGESIZE
        size = min(buffers.BUFFER_BYTES, -(-(end - begin) // mmap.PAGESIZE) * mmap.PAGESIZE)
        if begin + size < end:
            self._plan.appendleft((file, begin + size, end))
        room = self._free.pop()
        done = self._thread.submit(file.read, begin, room[:size], past_cache=True)
        self._queue.append(_Piece(file=file, begin=begin, end=begin + size, room=room, done=done))

    def _retire(self) -> None:
        """Frees the buffer of the first piece."""
        piece = self._queue.popleft()
        if not piece.done.cancel():
            with suppress(OSError):  # an error in bytes that were not requested
                piece.done.result()
        self._free.append(piece.room)
        if not any(other.file is piece.file for other in self._queue):
            piece.file.rest()

    def _drop(self) -> None:
        self._plan.clear()
        while self._queue:
            self._retire()


def _at_once(file: InFile, begin: int, end: int) -> Iterator[Bytes]:
    """`ReadAhead.views` for ranges that were not announced."""
    room = np.empty(min(end - begin, buffers.BUFFER_BYTES), dtype=np.uint8)
    while begin < end:
        num_read = file.read(begin, room[: end - begin])
        if num_read == 0:
            return
        yield room[:num_read]
        begin += num_read


def _is_cached(descriptor: int, begin: int, size: int) -> bool:
    """Whether the page cache contains all of these bytes, as far as the system reports it."""
    mincore = getattr(_LIBC, "mincore", None)
    if mincore is None:
        return False
    try:
        size = max(min(size, os.fstat(descriptor).st_size - begin), 1)
        pages = mmap.mmap(descriptor, size, prot=mmap.PROT_READ, offset=begin)
    except (OSError, ValueError):  # not supported by this file system, or the file ends earlier
        return False
    with pages:
        there = np.zeros(-(-size // mmap.PAGESIZE), dtype=np.uint8)
        mapped = np.frombuffer(pages, dtype=np.uint8)
        address = ctypes.c_void_p(mapped.__array_interface__["data"][0])
        failed = mincore(address, ctypes.c_size_t(size), ctypes.c_void_p(there.ctypes.data))
        del mapped  # otherwise the mapping could not be closed
    return not failed and bool((there & 1).all())


_LIBC = ctypes.CDLL(None)
