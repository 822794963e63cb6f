"""Space on a disk for tensors whose number and sizes are not known in advance."""

from __future__ import annotations

import contextlib
from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ds_core import io
from ds_offload.nvme.block_sums import BlockSums
from ds_offload.nvme.options import NVMeOptions
from ds_offload.nvme.store import SwapError
from ds_offload.nvme.swap_file import ALIGNMENT, SwapFile, aligned

FILE_BYTES = 256 << 20
"""Size of the first file."""
_GROWTH = 4
"""Each further file has at least one in so many bytes of those before."""


@dataclass(eq=False)
class Extent:
    """A range of a file. One read or write at a time may be in progress on it."""

    file: SwapFile
    offset: int
    num_bytes: int
    sums: BlockSums

    def write(self, values: Tensor) -> io.Work:
        """Begins to write 1-D uint8 values, which must not be changed before it is done."""
        self.sums.written(0, values)
        return self.file.file.write(values, self.offset)

    def read(self, out: Tensor) -> io.Work:
        """Begins to read into `out`, which `check` must approve when it is done."""
        return self.file.file.read(out, self.offset)

    def check(self, values: Tensor) -> None:
        """
        Raises:
            SwapError: the disk returned other values than were written.
        """
        first = self.sums.first_difference(0, values)
        if first is not None:
            raise SwapError(
                f"an activation of {self.num_bytes} bytes was changed on the disk: other values were read from "
                f"{self.file.file.path}, byte {self.offset + first} on, than were written. Check the disk, and that no "
                "other process writes to it; then repeat the step, or continue from a checkpoint"
            )


@dataclass(eq=False)
class _File:
    swap: SwapFile
    free: list[tuple[int, int]] = field(default_factory=list)
    """(begin, end) of the ranges that nobody uses, in order."""


class DiskSpace:
    """Extents of files without names, which are made when there is no room in those that exist."""

    def __init__(self, folder: Path, options: NVMeOptions) -> None:
        self._folder, self._options = folder, options
        self._engine: io.Engine | None = None
        self._files: list[_File] = []
        self._released: deque[Extent] = deque()
        self._in_use_bytes = 0

    @property
    def in_use_bytes(self) -> int:
        """Bytes of extents."""
        self._collect()
        return self._in_use_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of the files."""
        return sum(file.swap.num_bytes for file in self._files)

    def allocate(self, num_bytes: int) -> Extent:
        """
        Raises:
            OSError: the folder cannot be used, or its disk has no room.
        """
        self._collect()
        size = aligned(num_bytes)
        file, begin = self._first_fit(size) or self._grown(size)
        at = next(i for i, (first, _) in enumerate(file.free) if first == begin)
        end = file.free.pop(at)[1]
        if begin + size < end:
            file.free.insert(at, (begin + size, end))
        self._in_use_bytes += size
        return Extent(file.swap, begin, num_bytes, BlockSums(num_bytes, self._options.verify))

    def first_aligned_byte(self, memory: Tensor) -> int:
        """Returns the index of the first byte of 1-D uint8 memory to which a disk can write directly."""
        return -memory.data_ptr() % ALIGNMENT

    def release(self, extent: Extent) -> None:
        """Gives an extent back, on which nothing is in progress. Any thread may call this."""
        self._released.append(extent)

    def close(self) -> None:
        """Frees the space. Nothing may be in progress."""
        files, self._files = self._files, []
        self._released.clear()
        self._in_use_bytes = 0
        for file in files:
            file.swap.close()
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def _first_fit(self, size: int) -> tuple[_File, int] | None:
        for file in self._files:
            for begin, end in file.free:
                if end - begin >= size:
                    return file, begin
        return None

    def _grown(self, size: int) -> tuple[_File, int]:
        if self._engine is None:
            chosen = self._options
            self._engine = io.Engine(
                backend=chosen.backend,
                block_bytes=chosen.block_bytes,
                queue_depth=chosen.queue_depth,
                num_threads=chosen.num_threads,
                direct=chosen.direct,
            )
        wanted = aligned(max(size, FILE_BYTES if not self._files else self.num_bytes // _GROWTH))
        swap = None
        if wanted > size:
            with contextlib.suppress(OSError):  # there may be room for this one tensor
                swap = SwapFile(self._engine, self._folder, wanted)
        if swap is None:
            swap = SwapFile(self._engine, self._folder, size)
        self._files.append(_File(swap, [(0, swap.num_bytes)]))
        return self._files[-1], 0

    def _collect(self) -> None:
        while self._released:
            extent = self._released.popleft()
            file = next((f for f in self._files if f.swap is extent.file), None)
            if file is None:  # the space was closed
                continue
            size = aligned(extent.num_bytes)
            self._in_use_bytes -= size
            insort(file.free, (extent.offset, extent.offset + size))
            joined: list[tuple[int, int]] = []
            for begin, end in file.free:
                if joined and joined[-1][1] == begin:
                    joined[-1] = (joined[-1][0], end)
                else:
                    joined.append((begin, end))
            file.free = joined
