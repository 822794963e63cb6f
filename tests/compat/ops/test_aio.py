"""`deepspeed.ops.aio`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_core.io import IoError


@pytest.fixture
def handle() -> Any:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    assert AsyncIOBuilder().is_compatible()
    return AsyncIOBuilder().load().aio_handle(4096, 4, False, True, 2)


def test_settings_are_told(handle: Any) -> None:
    from deepspeed.ops.aio import aio_handle

    assert isinstance(handle, aio_handle)
    told = (
        handle.get_block_size(),
        handle.get_queue_depth(),
        handle.get_single_submit(),
        handle.get_overlap_events(),
        handle.get_intra_op_parallelism(),
        handle.get_alignment(),
    )
    assert told == (4096, 4, False, True, 2, 1024)
    assert aio_handle().get_queue_depth() == 128


def test_writes_and_reads(handle: Any, tmp_path: Path) -> None:
    data = torch.randn(3_001)
    path = str(tmp_path / "data")
    assert handle.sync_pwrite(data, path) == 1
    assert handle.async_pwrite(data, path, 20_000) == 0
    assert handle.async_pwrite(buffer=data[:10], filename=path, file_offset=40_001) == 0
    assert handle.wait() == 2
    assert handle.wait() == 0
    raw = data.numpy().tobytes()
    content = Path(path).read_bytes()
    assert content[: len(raw)] == raw
    assert content[20_000 : 20_000 + len(raw)] == raw
    assert content[40_001:] == raw[:40]
    out = torch.empty_like(data)
    assert handle.async_pread(out, path, 20_000) == 0
    other = torch.empty_like(data)
    assert handle.sync_pread(other, path) == 2  # and the one before
    assert torch.equal(out, data)
    assert torch.equal(other, data)
    assert handle.read(out, path, True) == 0
    assert handle.write(data, path, True) == 0
    assert handle.pread(out, path, False, True, 0) == 0
    assert handle.pwrite(data, path, False, False, 100_000) == 2
    assert len(Path(path).read_bytes()) == 100_000 + len(raw)


def test_an_open_descriptor(handle: Any, tmp_path: Path) -> None:
    data = torch.arange(5_000)
    descriptor = os.open(tmp_path / "data", os.O_CREAT | os.O_WRONLY)
    try:
        assert handle.async_pwrite(data, descriptor, 8) == 0
        assert handle.async_pwrite(buffer=data, fd=descriptor, file_offset=40_008) == 0
        assert handle.wait() == 2
    finally:
        os.close(descriptor)
    assert (tmp_path / "data").read_bytes() == bytes(8) + 2 * data.numpy().tobytes()


def test_failures_raise_and_leave_the_handle_usable(handle: Any, tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(bytes(100))
    with pytest.raises(IoError, match="the file has 100 bytes, at least 400 were expected"):
        handle.sync_pread(torch.empty(100), str(path))
    with pytest.raises(IoError, match="No such file"):
        handle.async_pread(torch.empty(1), str(tmp_path / "absent"))
    assert handle.sync_pread(torch.empty(25), str(path)) == 1


def test_validation_finds_a_difference(handle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_compat.ops import aio

    path = str(tmp_path / "data")
    data = torch.ones(1000)
    handle.sync_pwrite(data, path)
    out = torch.empty(1000)
    wait = aio.Work.wait
    monkeypatch.setattr(aio.Work, "wait", lambda work: (wait(work), out[7].fill_(3))[0])
    with pytest.raises(RuntimeError, match=r"validate: 4000 bytes at offset 0 of .* differ"):
        handle.pread(out, path, True, False)


def test_locked_tensors_are_known_to_every_handle(handle: Any) -> None:
    from deepspeed.ops.op_builder import PinMemoryBuilder

    other = PinMemoryBuilder().load().pin_handle()
    buffer = handle.new_cpu_locked_tensor(10_000, torch.empty(0, dtype=torch.bfloat16))
    assert (buffer.shape, buffer.dtype) == ((10_000,), torch.bfloat16)
    assert handle.is_pinned(buffer[5:]) and other.is_pinned(buffer)
    assert not handle.is_pinned(torch.empty(10_000))
    assert other.free_cpu_locked_tensor(buffer)
    assert not handle.free_cpu_locked_tensor(buffer)
    assert not other.is_pinned(buffer)


def test_functions_of_the_module(tmp_path: Path) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    module = AsyncIOBuilder().load()
    data, out = torch.randn(500), torch.empty(500)
    path = str(tmp_path / "data")
    assert module.aio_write(data, path, 1 << 20, 8, False, True, True) == 0
    assert module.aio_read(out, path, 1 << 20, 8, False, True, True) == 0
    assert torch.equal(data, out)
    assert module.deepspeed_memcpy(out, torch.zeros(500)) == 0
    assert out.count_nonzero() == 0
