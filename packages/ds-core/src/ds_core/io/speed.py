"""Measures how fast a folder's file system reads and writes with given settings."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import torch

from ds_core import arena
from ds_core.io.engine import Engine


@dataclass(frozen=True)
class Setting:
    """Arguments of an engine, in the terms of the configuration's section `aio`."""

    block_bytes: int
    """Size of a request."""
    queue_depth: int
    """Requests in flight."""
    num_threads: int
    """Threads that share one read or write; 0: as `Engine` chooses."""

    @property
    def in_flight_bytes(self) -> int:
        return self.block_bytes * self.queue_depth


@dataclass(frozen=True)
class Rate:
    """What a setting reached, in bytes per second; the fastest of its rounds."""

    setting: Setting
    write: float
    read: float
    backend: str
    direct: bool

    @property
    def both(self) -> float:
        """The rate of writing and then reading the same number of bytes."""
        return 2 / (1 / self.write + 1 / self.read)


class SpeedTest:
    """Writes and reads one file of `num_bytes` in `folder`; a context manager.

    The file has no name, so that it is gone when this process ends, however it ends.

    Raises:
        OSError: the folder cannot be written to, or has not twice as much room as is needed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        num_bytes: int,
        *,
        backend: Literal["auto", "io_uring", "threads"] = "auto",
    ) -> None:
        free = shutil.disk_usage(folder).free
        if free < 2 * num_bytes:
            raise OSError(
                f"{os.fspath(folder)} has {free / 2**30:.2f} GiB of free space; a file of {num_bytes / 2**30:.2f} GiB "
                "is only written where there is twice as much. Choose a smaller size or another folder"
            )
        self.backend = backend
        self.num_bytes = num_bytes
        self.bytes_written = 0
        handle, self._path = tempfile.mkstemp(prefix=".ds-speed-test-", dir=folder)
        os.close(handle)
        try:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        finally:
            os.unlink(self._path)
        self._buffer = arena.empty(num_bytes, torch.uint8).random_(0, 256)
        self._written = False

    def measure(
        self, setting: Setting, rounds: int = 1, clock: Callable[[], float] = time.perf_counter
    ) -> Rate:
        """Writes and reads the file `rounds` times. The first call writes it once more, to allocate its blocks."""
        write_s, read_s = [], []
        with Engine(
            backend=self.backend,
            block_bytes=setting.block_bytes,
            queue_depth=setting.queue_depth,
            num_threads=setting.num_threads,
        ) as engine:
            with engine.open(f"/proc/self/fd/{self._descriptor}") as file:
                if not self._written:
                    file.write(self._buffer).wait()
                    self.bytes_written += self.num_bytes
                    self._written = True
                for _ in range(rounds):
                    begin = clock()
                    file.write(self._buffer).wait()
                    middle = clock()
                    file.read(self._buffer).wait()
                    write_s.append(middle - begin)
                    read_s.append(clock() - middle)
                    self.bytes_written += self.num_bytes
                return Rate(
                    setting,
                    self.num_bytes / min(write_s),
                    self.num_bytes / min(read_s),
                    engine.backend,
                    file.direct,
                )

    def __enter__(self) -> SpeedTest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


def best(rates: list[Rate], tolerance: float = 0.03) -> Rate:
    """The rate that keeps the fewest bytes in flight among those within `tolerance` of the fastest."""
    limit = max(rate.both for rate in rates) * (1 - tolerance)
    return min((r for r in rates if r.both >= limit), key=lambda r: (r.setting.in_flight_bytes, -r.both))
