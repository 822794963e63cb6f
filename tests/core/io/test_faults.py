"""System calls that fail, are interrupted, transfer a part, or do not return."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from core.io.faults import Fault, fault
from ds_core.io import Engine, File, IoError, IoTimeoutError

Inject = Callable[..., None]
SIZE = 100_000


@pytest.fixture
def data() -> torch.Tensor:
    return torch.arange(SIZE, dtype=torch.int64).to(torch.uint8)


@pytest.fixture
def file(engine: Engine, tmp_path: Path) -> File:
    return engine.open(tmp_path / "data", create=True, num_bytes=SIZE)


@pytest.mark.parametrize(
    "faults",
    [
        [fault("write", at_most=1000, times=-1), fault("read", at_most=777, times=-1)],
        [fault("write", at_most=512, times=50), fault("read", at_most=4096, skip=3, times=9)],
        [fault("write", code=errno.EINTR, times=40), fault("read", code=errno.EINTR, times=40)],
        [fault("write", code=errno.EAGAIN, times=5), fault("read", code=errno.EAGAIN, skip=2, times=20)],
        [fault("io_uring_enter", code=errno.EINTR, times=30), fault("io_uring_enter", code=errno.EAGAIN, times=3)],
    ],
    ids=["parts", "direct parts", "EINTR", "EAGAIN", "enter"],
)  # fmt: skip
def test_what_is_overcome(file: File, data: torch.Tensor, inject: Inject, faults: list[Fault]) -> None:
    inject(*faults)
    file.write(data[10:], 10).wait()
    file.write(data[:10]).wait()
    out = torch.empty_like(data)
    file.read(out).wait()
    assert torch.equal(out, data)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "Free space on this file system"),
        (errno.EIO, "look at the kernel's log"),
        (errno.EBADF, "descriptor was closed by somebody else"),
    ],
)
def test_what_fails(file: File, data: torch.Tensor, inject: Inject, code: int, remedy: str) -> None:
    inject(fault("write", code=code, skip=2))
    work = file.write(data, 500)
    with pytest.raises(IoError, match=remedy) as raised:
        work.wait()
    error = raised.value
    assert work.done()
    assert (error.errno, error.filename, error.operation, error.offset, error.num_bytes) == (
        code,
        file.path,
        "write",
        500,
        SIZE,
    )
    assert 0 < error.bytes_done < SIZE
    assert f"write of {SIZE} bytes at offset 500" in str(error)
    rebuilt = pickle.loads(pickle.dumps(error))
    assert (str(rebuilt), vars(rebuilt), type(rebuilt)) == (str(error), vars(error), IoError)
    with pytest.raises(IoError):  # it stays failed
        work.wait()
    file.write(data).wait()  # and the engine goes on


def test_a_descriptor_that_is_really_closed(engine: Engine, tmp_path: Path, data: torch.Tensor) -> None:
    """Not injected: a file that is open for reading only."""
    path = tmp_path / "data"
    path.write_bytes(bytes(SIZE))
    file = engine.open(path, read_only=True)
    with pytest.raises(IoError, match="write of 100000 bytes at offset 0, 0 bytes of them done") as raised:
        file.write(data).wait()
    assert raised.value.errno == errno.EBADF


def test_a_truncated_file_names_both_sizes(file: File, data: torch.Tensor) -> None:
    with open(file.path, "r+b") as plain:
        plain.truncate(70_001)
    with pytest.raises(IoError, match=r"the file has 70001 bytes, at least 100000 were expected") as raised:
        file.read(torch.empty_like(data)).wait()
    assert raised.value.errno == errno.ENODATA
    out = torch.empty(70_001, dtype=torch.uint8)
    file.read(out).wait()
    with pytest.raises(IoError, match="the file has 70001 bytes, at least 100000 were expected"):
        file._engine.open(file.path, num_bytes=SIZE)


def test_a_refusal_of_direct_requests_is_said_and_survived(
    engine: Engine, file: File, data: torch.Tensor, inject: Inject
) -> None:
    if not file.direct:
        pytest.skip(f"no direct I/O: {file.reason}")
    inject(fault("write", code=errno.EINVAL))
    file.write(data).wait()
    assert not file.direct
    assert "failed: Invalid argument" in file.reason
    out = torch.empty_like(data)
    file.read(out).wait()
    assert torch.equal(out, data)


def test_a_file_system_that_refuses_to_open_with_o_direct(
    engine: Engine, tmp_path: Path, data: torch.Tensor, inject: Inject
) -> None:
    (tmp_path / "data").touch()
    inject(fault("open", code=errno.EINVAL, skip=1))
    file = engine.open(tmp_path / "data")
    if file.reason == "the file system has no direct I/O for this file":
        pytest.skip(f"no direct I/O in {tmp_path}")
    assert not file.direct
    assert file.reason == "open with O_DIRECT: Invalid argument"
    file.write(data).wait()
    assert Path(file.path).read_bytes() == data.numpy().tobytes()


def test_no_room_leaves_no_file(engine: Engine, tmp_path: Path, inject: Inject) -> None:
    inject(fault("allocate", code=errno.ENOSPC))
    with pytest.raises(IoError, match="Free space") as raised:
        engine.open(tmp_path / "new", create=True, num_bytes=1 << 20)
    assert raised.value.errno == errno.ENOSPC
    assert not (tmp_path / "new").exists()
    with pytest.raises(IoError) as raised:  # really more than there is
        engine.open(tmp_path / "new", create=True, num_bytes=1 << 50)
    assert raised.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert not (tmp_path / "new").exists()


def test_a_wait_ends_and_the_operation_goes_on(file: File, data: torch.Tensor, inject: Inject) -> None:
    inject(fault("write", hold=True, times=-1))
    work = file.write(data)
    assert not work.done()
    with pytest.raises(IoTimeoutError, match=r"is not done after 0.01 s \(timeout_s\)") as raised:
        work.wait(0.01)
    assert isinstance(raised.value, TimeoutError)
    assert (raised.value.filename, raised.value.num_bytes) == (file.path, SIZE)
    rebuilt = pickle.loads(pickle.dumps(raised.value))
    assert (str(rebuilt), type(rebuilt)) == (str(raised.value), IoTimeoutError)
    inject()
    work.wait()
    assert Path(file.path).read_bytes() == data.numpy().tobytes()


def test_waits_are_limited_without_a_timeout(
    backend: str, tmp_path: Path, data: torch.Tensor, inject: Inject
) -> None:
    engine = Engine(backend=backend, stall_limit_s=0.05, block_bytes=4096, queue_depth=1)  # type: ignore[arg-type]
    file = engine.open(tmp_path / "data", create=True, num_bytes=SIZE)
    inject(fault("write", hold=True, skip=3, times=-1))
    first, second = file.write(data), file.write(data)
    with pytest.raises(IoTimeoutError, match=r"no request of the engine has completed for 0.05 s"):
        first.wait()
    with pytest.raises(IoError, match="those that had not begun were cancelled"):
        engine.close()
    inject()
    with pytest.raises(IoError, match="Operation canceled"):
        second.wait(60)
    with pytest.raises(IoError, match="Operation canceled"):  # its first blocks were written
        first.wait(60)


def test_failures_that_nobody_saw_are_raised_by_close(
    engine: Engine, file: File, data: torch.Tensor, inject: Inject
) -> None:
    inject(fault("write", code=errno.EIO))
    file.write(data)
    with pytest.raises(IoError, match="Input/output error"):
        file.close()
    file.close()
    with pytest.raises(ValueError, match="the file is closed"):
        file.write(data)


def test_close_of_the_engine_raises_them_too(
    backend: str, tmp_path: Path, data: torch.Tensor, inject: Inject
) -> None:
    engine = Engine(backend=backend)  # type: ignore[arg-type]
    file = engine.open(tmp_path / "data", create=True)
    inject(fault("write", code=errno.ENOSPC))
    file.write(data)
    with pytest.raises(IoError, match="No space left"):
        engine.close()
    engine.close()
    with pytest.raises(ValueError, match="the I/O engine is closed"):
        file.write(data)
    with pytest.raises(ValueError, match="the I/O engine is closed"):
        engine.open(tmp_path / "data")


@pytest.mark.parametrize(
    ("code", "explanation"),
    [(errno.EPERM, "seccomp"), (errno.ENOSYS, "needs Linux 5.6"), (errno.ENOMEM, "ulimit -l")],
)
def test_without_io_uring_there_are_threads(
    inject: Inject, tmp_path: Path, data: torch.Tensor, code: int, explanation: str
) -> None:
    inject(fault("io_uring_setup", code=code, times=-1))
    with Engine() as engine:
        assert engine.backend == "threads"
        assert explanation in engine.reason
        file = engine.open(tmp_path / "data", create=True)
        file.write(data).wait()
        file.close()
    assert (tmp_path / "data").read_bytes() == data.numpy().tobytes()
    with pytest.raises(IoError, match='Use backend="auto"'):
        Engine(backend="io_uring")
