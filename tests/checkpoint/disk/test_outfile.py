"""Files that are written once, past the page cache or through it."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch

from ds_checkpoint.disk import buffers, outfile
from ds_checkpoint.disk.outfile import OutFile

LARGE = outfile.LARGE_BYTES


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "BUFFER_BYTES", 8192)
    monkeypatch.setattr(outfile, "FLUSH_BYTES", 5000)


def written(path: Path, size: int, sizes: list[int]) -> bytes:
    """Write pieces of these sizes, each from a buffer that changes at once; what they were."""
    wanted = b""
    with OutFile(path, size) as file:
        file.write(b"head")
        for number, each in enumerate(sizes):
            block = torch.arange(each, dtype=torch.int64).add_(number).to(torch.uint8)
            wanted += block.numpy().tobytes()
            file.write(block)
            block.zero_()
    return b"head" + wanted


@pytest.mark.parametrize("size", [0, LARGE], ids=["cached", "past the cache"])
@pytest.mark.parametrize(
    "sizes", [[], [1], [8188], [8189], [8192, 8192], [5000] * 7, [40000], [0, 3, 20000, 1]], ids=str
)
def test_what_is_written_is_there(tmp_path: Path, size: int, sizes: list[int]) -> None:
    assert (tmp_path / "f").exists() is False
    wanted = written(tmp_path / "f", size, sizes)
    assert (tmp_path / "f").read_bytes() == wanted
    with pytest.raises(FileExistsError):
        OutFile(tmp_path / "f", size)
    assert not any("disk" in thread.name for thread in threading.enumerate())


def test_a_file_system_that_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open
    write = os.write

    def refuse(path: Path, flags: int, *more: int) -> int:
        if flags & os.O_DIRECT:
            path.touch()  # as some do
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *more)

    monkeypatch.setattr(os, "open", refuse)
    assert written(tmp_path / "f", LARGE, [20000]) == (tmp_path / "f").read_bytes()
    monkeypatch.undo()

    def unaligned(descriptor: int, content: memoryview) -> int:
        if outfile._goes_past_cache(descriptor):
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(descriptor, content[:3000])

    monkeypatch.setattr(os, "write", unaligned)
    monkeypatch.setattr(buffers, "BUFFER_BYTES", 8192)
    assert written(tmp_path / "g", LARGE, [20000]) == (tmp_path / "g").read_bytes()


def _given_up(path: Path, size: int) -> None:
    with OutFile(path, size) as file:
        file.write(b"x" * 20000)
        raise ZeroDivisionError


@pytest.mark.parametrize("size", [0, LARGE], ids=["cached", "past the cache"])
@pytest.mark.parametrize("at", [1, 3])
def test_a_full_disk_raises_and_leaves_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, at: int
) -> None:
    write, calls = os.write, [0]

    def full(descriptor: int, content: memoryview) -> int:
        calls[0] += 1
        if calls[0] > at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "f", size, [8192] * 6)
    assert not any("disk" in thread.name for thread in threading.enumerate())
    monkeypatch.undo()
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    with pytest.raises(ZeroDivisionError):
        _given_up(tmp_path / "g", size)
    after = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    assert after <= before
