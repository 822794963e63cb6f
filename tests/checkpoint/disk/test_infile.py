"""Files that are read ahead, past the page cache or through it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_checkpoint.disk import buffers, infile
from ds_checkpoint.disk.infile import InFile, ReadAhead

PIECE = 2 * mmap.PAGESIZE
SIZE = 20 * PIECE + 1234


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "BUFFER_BYTES", PIECE)
    monkeypatch.setattr(infile, "LITTLE_BYTES", 100)


@pytest.fixture
def ahead() -> Iterator[ReadAhead]:
    ahead = ReadAhead()
    yield ahead
    ahead.close()
    assert not any("disk" in thread.name for thread in threading.enumerate())


def made(path: Path, seed: int = 0, size: int = SIZE) -> bytes:
    """A file whose pages are on the disk and not in the cache."""
    content = random.Random(seed).randbytes(size)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return content


def whole(ahead: ReadAhead, file: InFile, begin: int, end: int) -> bytes:
    return b"".join(view.tobytes() for view in ahead.views(file, begin, end))


def reads_fail(monkeypatch: pytest.MonkeyPatch, number: int, *, direct_only: bool) -> None:
    read = os.preadv

    def fail(descriptor: int, rooms: list[memoryview], offset: int) -> int:
        if not direct_only or fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(number, os.strerror(number))
        return read(descriptor, rooms, offset)

    monkeypatch.setattr(os, "preadv", fail)


def no_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse(path: Path, flags: int, *more: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *more)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize("how", ["direct", "not opened", "not read", "cached"])
def test_any_order_of_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: ReadAhead, how: str
) -> None:
    contents = [made(tmp_path / str(n), n) for n in range(2)]
    if how == "not opened":
        no_direct(monkeypatch)
    if how == "not read":
        reads_fail(monkeypatch, errno.EINVAL, direct_only=True)
    if how == "cached":
        for n in range(2):
            (tmp_path / str(n)).read_bytes()
    files = [InFile(tmp_path / str(n)) for n in range(2)]
    choose = random.Random(7)
    for _ in range(40):
        spans, number, at = [], 0, 0
        for _ in range(12):
            if choose.random() < 0.2:
                number = choose.randrange(2)
            if choose.random() < 0.3 or at >= SIZE:
                at = choose.randrange(SIZE)
            end = min(at + choose.choice([1, 50, 99, 101, PIECE - 1, PIECE, PIECE + 1, 5 * PIECE]), SIZE)
            spans.append((number, at, end))
            at = end
        told = [span for span in spans if choose.random() < 0.8]  # readers may be wrong
        if choose.random() < 0.7:
            ahead.expect((files[n], begin, end) for n, begin, end in told)
        for n, begin, end in spans:
            assert whole(ahead, files[n], begin, end) == contents[n][begin:end]
    ahead.close()
    for file in files:
        file.close()
        file.close()


def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What the system was asked for: [begin, end)."""
    found: list[tuple[int, int]] = []
    read = os.preadv

    def note(descriptor: int, rooms: list[memoryview], offset: int) -> int:
        found.append((offset, offset + rooms[0].nbytes))
        return read(descriptor, rooms, offset)

    monkeypatch.setattr(os, "preadv", note)
    return found


def test_what_is_expected_is_read_ahead_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: ReadAhead
) -> None:
    for n in range(2):
        made(tmp_path / str(n), n)
    one, other = InFile(tmp_path / "0"), InFile(tmp_path / "1")
    seen = asked(monkeypatch)
    whole(ahead, one, 3 * PIECE + 5, 4 * PIECE)
    assert seen == [(3 * PIECE, 4 * PIECE)]
    spans = [(one, 0, PIECE), (one, PIECE, PIECE + 4), (one, 8 * PIECE, 8 * PIECE + 4), (other, 0, 3 * PIECE)]
    ahead.expect([*spans, (one, 9 * PIECE, 10 * PIECE), (one, 12 * PIECE, 13 * PIECE)])
    for file, begin, end in spans:
        whole(ahead, file, begin, end)
    ahead.close()
    page = mmap.PAGESIZE
    alone = (8 * PIECE, 8 * PIECE + 4)  # when it is asked for
    assert alone in seen
    rest = [(0, PIECE), (PIECE, PIECE + page), (0, PIECE), (PIECE, 2 * PIECE), (2 * PIECE, 3 * PIECE)]
    following = [(9 * PIECE, 10 * PIECE), (12 * PIECE, 13 * PIECE)]
    # How many of them were read when the reader ended, is a matter of time.
    assert [at for at in seen[1:] if at != alone] in [[*rest, *following[:n]] for n in range(3)]
    for file in (one, other):
        file.close()


def test_a_file_that_was_cut_off(tmp_path: Path, ahead: ReadAhead) -> None:
    content = made(tmp_path / "f")
    file = InFile(tmp_path / "f")
    os.truncate(tmp_path / "f", 5 * PIECE + 17)
    assert whole(ahead, file, 0, SIZE) == content[: 5 * PIECE + 17]
    assert whole(ahead, file, 5 * PIECE, 5 * PIECE + 30) == content[5 * PIECE : 5 * PIECE + 17]
    assert whole(ahead, file, 8 * PIECE, 9 * PIECE) == b""
    ahead.close()
    file.close()


def test_errors_of_the_disk_reach_who_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: ReadAhead
) -> None:
    content = made(tmp_path / "f")
    file = InFile(tmp_path / "f")
    assert whole(ahead, file, 0, PIECE) == content[:PIECE]
    reads_fail(monkeypatch, errno.EIO, direct_only=False)
    with pytest.raises(OSError, match="Input/output error"):
        whole(ahead, file, 6 * PIECE, 9 * PIECE)
    monkeypatch.undo()
    assert whole(ahead, file, 6 * PIECE, 9 * PIECE) == content[6 * PIECE : 9 * PIECE]
    ahead.close()
    file.close()
