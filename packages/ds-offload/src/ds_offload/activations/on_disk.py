"""Moved tensors on a disk."""

from __future__ import annotations

import enum
from collections import deque
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_core import io
from ds_offload.activations.buffers import Buffer, HostBuffers
from ds_offload.activations.copies import Copies, Copy, Finished, HostCopies
from ds_offload.activations.places import Arriving, Moved, Return
from ds_offload.nvme.swap_file import ALIGNMENT


class Extent(Protocol):
    """A range of bytes on a disk. One read or write at a time may be in progress on it."""

    num_bytes: int

    def write(self, values: Tensor) -> io.Work:
        """Begins to write 1-D uint8 values, which must not be changed before it is done."""

    def read(self, out: Tensor) -> io.Work:
        """Begins to read into `out`, which `check` must approve when it is done."""

    def check(self, values: Tensor) -> None:
        """
        Raises:
            SwapError: the disk returned other values than were written.
        """


class Space(Protocol):
    """Room on a disk."""

    @property
    def in_use_bytes(self) -> int:
        """Bytes of extents."""

    def allocate(self, num_bytes: int) -> Any:
        """Returns an `Extent`.

        Raises:
            OSError: the folder cannot be used, or its disk has no room.
        """

    def first_aligned_byte(self, memory: Tensor) -> int:
        """Returns the index of the first byte of 1-D uint8 memory to which a disk can write directly."""

    def release(self, extent: Any) -> None:
        """Gives an extent back, on which nothing is in progress. Any thread may call this."""

    def close(self) -> None:
        """Frees the space. Nothing may be in progress."""


class _State(enum.Enum):
    LEAVING = "copied into the buffer, which belongs to the copy"
    WRITING = "written; the buffer belongs to the disk, which reads it; others may read it, too"
    WRITTEN = "on the disk; there is no buffer"
    FREED = "given up"


class DiskPlace:
    """Files in a folder. Tensors are copied to buffers in host memory, and written from there."""

    def __init__(self, device: torch.device, copies: Copies, buffers: HostBuffers, space: Space) -> None:
        self.device, self.copies, self.buffers, self.space = device, copies, buffers, space
        self._unwritten: deque[_OnDisk] = deque()
        """Those that have buffers, in the order in which they were moved."""
        self._freed: deque[_OnDisk] = deque()

    @property
    def in_use_bytes(self) -> int:
        """Bytes on the disk that hold moved tensors."""
        self._collect()
        return self.space.in_use_bytes

    def move(self, source: Tensor) -> Moved:
        """See `Place.move`. Waits until tensors have been written, if there is no room for the buffer."""
        self._collect()
        for waiting in self._unwritten:
            waiting.write_if_copied()
        extent = self.space.allocate(source.numel())
        buffer = self.buffer(source.numel())
        moved = _OnDisk(self, extent, buffer, self.copies.start(source, buffer.tensor))
        moved.write_if_copied()
        self._unwritten.append(moved)
        return moved

    def buffer(self, num_bytes: int) -> Buffer:
        """Returns a buffer. If there is no room for it, waits for writes; if there are none, exceeds the limit."""
        while self._unwritten:
            buffer = self.buffers.take(num_bytes)
            if buffer is not None:
                return buffer
            self._unwritten.popleft().finish_writing()
        made = self.buffers.take(num_bytes, over_limit=True)
        assert made is not None
        return made

    def release(self, moved: _OnDisk) -> None:
        """Gives up a tensor. Any thread may call this, so it only takes note."""
        self._freed.append(moved)

    def close(self) -> None:
        """See `Place.close`."""
        while self._unwritten:
            self._unwritten.popleft().finish_writing()
        self._freed.clear()
        self.buffers.clear()
        self.space.close()

    def _collect(self) -> None:
        while self._freed:
            moved = self._freed.popleft()
            if moved in self._unwritten:
                self._unwritten.remove(moved)
            moved.give_up()


class _OnDisk:
    """One tensor. Implements `Moved`."""

    def __init__(self, place: DiskPlace, extent: Extent, buffer: Buffer, leaving: Copy) -> None:
        self._place, self._extent = place, extent
        self._state = _State.LEAVING
        self._buffer: Buffer | None = buffer
        self._leaving = leaving
        self._returning: Copy = leaving
        """The last copy out of the buffer."""
        self._writing: io.Work | None = None
        self._reading: io.Work | None = None

    def has_left(self) -> bool:
        return self._state is not _State.LEAVING or self._leaving.done()

    def leave(self) -> None:
        if self._state is _State.LEAVING:
            self._leaving.order()

    def write_if_copied(self) -> None:
        """Begins to write, if the values are in the buffer."""
        if self._state is _State.LEAVING and self._leaving.done():
            self._write()

    def finish_writing(self) -> None:
        """Returns when the values are on the disk, and gives the buffer back.

        Raises:
            IoError: they could not be written.
        """
        if self._state is _State.LEAVING:
            self._leaving.wait()
            self._write()
        if self._state is _State.WRITING:
            self._end_writing()

    def load(self) -> Return:
        """Begins to bring the values back: out of the buffer, if they are still there."""
        place, num_bytes = self._place, self._extent.num_bytes
        if self._buffer is not None:
            out = torch.empty(num_bytes, dtype=torch.uint8, device=place.device)
            self._returning = place.copies.start(self._buffer.tensor, out)
            return Arriving(out, self._returning)
        if isinstance(place.copies, HostCopies):
            memory = torch.empty(num_bytes + ALIGNMENT, dtype=torch.uint8)
            begin = place.space.first_aligned_byte(memory)
            out = memory[begin : begin + num_bytes]
            self._reading = self._extent.read(out)
            return _Reading(self._reading, self._extent, out)
        buffer = place.buffer(num_bytes)
        self._reading = self._extent.read(buffer.tensor)
        return _ReadingToDevice(self._reading, self._extent, buffer, place)

    def free(self) -> None:
        if self._state is not _State.FREED:
            self._place.release(self)

    def give_up(self) -> None:
        """Frees buffer and extent, when nothing uses them any more."""
        if self._state is _State.LEAVING:
            self._leaving.wait()
        if self._state is _State.WRITING:
            self._end_writing()
        elif self._buffer is not None:
            self._place.buffers.give(self._buffer)
            self._buffer = None
        if self._reading is not None and not self._reading.done():
            self._reading.wait()
        self._state = _State.FREED
        self._place.space.release(self._extent)

    def _write(self) -> None:
        assert self._buffer is not None
        self._writing = self._extent.write(self._buffer.tensor)
        self._state = _State.WRITING

    def _end_writing(self) -> None:
        assert self._writing is not None and self._buffer is not None
        self._writing.wait()
        self._place.buffers.give(self._buffer, self._returning)
        self._buffer, self._writing, self._state = None, None, _State.WRITTEN


class _Reading:
    """A read into the memory in which the values are used."""

    def __init__(self, work: io.Work, extent: Extent, out: Tensor) -> None:
        self._work, self._extent, self._out = work, extent, out

    def poll(self) -> None:
        return None

    def wait(self) -> Tensor:
        self._work.wait()
        self._extent.check(self._out)
        return self._out


class _ReadingToDevice:
    """A read into a buffer, from which the values are copied to the device."""

    def __init__(self, work: io.Work, extent: Extent, buffer: Buffer, place: DiskPlace) -> None:
        self._work, self._extent, self._buffer, self._place = work, extent, buffer, place
        self._out: Tensor | None = None
        self._copy: Copy = Finished()

    def poll(self) -> None:
        if self._out is None and self._work.done():
            self._copy_to_device()

    def wait(self) -> Tensor:
        if self._out is None:
            self._copy_to_device()
        assert self._out is not None
        self._copy.order()
        return self._out

    def _copy_to_device(self) -> None:
        self._work.wait()
        self._extent.check(self._buffer.tensor)
        out = torch.empty(self._extent.num_bytes, dtype=torch.uint8, device=self._place.device)
        self._copy = self._place.copies.start(self._buffer.tensor, out)
        self._place.buffers.give(self._buffer, self._copy)
        self._out = out
