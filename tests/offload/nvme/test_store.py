"""NVMeStore: what a disk may do to values, and how that is noticed."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from ds_core import arena
from ds_offload import NVMeOptions, NVMeStore, SwapError
from ds_offload.nvme.block_sums import BLOCK_BYTES, BlockSums
from ds_zero.interfaces import Reservation, ShardKey

CPU = torch.device("cpu")
A, B = ShardKey(name="a", kind="master"), ShardKey(name="b", kind="master")


def item(key: ShardKey, numel: int, dtype: torch.dtype = torch.float32) -> Reservation:
    return Reservation(key=key, partition="g", numel=numel, dtype=dtype, device=CPU)


def the_files(folder: Path) -> list[int]:
    """Descriptors of this process's swap files in a folder, which have no names, without those with O_DIRECT."""
    numbers = [int(link.name) for link in Path("/proc/self/fd").iterdir() if str(folder) in _target(link)]
    return [number for number in numbers if not fcntl.fcntl(number, fcntl.F_GETFL) & os.O_DIRECT]


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except FileNotFoundError:  # the one with which the folder was listed
        return ""


def the_file(folder: Path) -> int:
    """Descriptor of the only swap file in a folder."""
    (number,) = the_files(folder) or [None]
    assert number is not None, "no swap file is open"
    return number


def test_a_tensor_that_was_never_written_is_zero_without_a_read(tmp_path: Path) -> None:
    store = NVMeStore(tmp_path)
    assert not store.reserve([item(A, 1000)])
    os.ftruncate(the_file(tmp_path), 0)  # a read would fail
    out = torch.ones(1000)
    store.load(A, out).wait()
    assert not out.any()
    store.close()


def test_files_have_no_name_and_their_space_is_freed(tmp_path: Path) -> None:
    store = NVMeStore(tmp_path)
    store.reserve([item(A, 1 << 20), item(B, 10)])
    assert not list(tmp_path.iterdir())
    number = the_file(tmp_path)
    assert os.fstat(number).st_size == store.num_bytes == (4 << 20) + 4096
    assert os.fstat(number).st_blocks * 512 >= 4 << 20, "the space is not reserved"
    store.release(A)
    assert store.num_bytes
    store.release(B)
    assert not store.num_bytes
    with pytest.raises(AssertionError, match="no swap file"):
        the_file(tmp_path)
    store.close()
    store.close()


def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    script = f"""
        import torch, ds_offload, time
        from ds_offload.interfaces import PageKey, PageReservation
        store = ds_offload.NVMeStore({str(tmp_path)!r})
        key = PageKey(name="a", owner=0)
        store.reserve([PageReservation(key=key, numel=1 << 22, device=torch.device("cpu"))])
        store.store(key, torch.ones(1 << 22, dtype=torch.uint8)).wait()
        print("ready", flush=True)
        time.sleep(60)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", [0, 5 << 20, (8 << 20) - 4])
def test_values_that_another_process_changed_are_found(tmp_path: Path, where: int) -> None:
    store = NVMeStore(tmp_path)
    store.reserve([item(B, 1024), item(A, 2 << 20)])
    values = torch.randn(2 << 20)
    store.store(A, values).wait()
    out = torch.empty_like(values)
    store.load(A, out).wait()
    assert torch.equal(out, values)
    block = where // BLOCK_BYTES
    os.pwrite(the_file(tmp_path), b"\1\2\3\4", 4096 + where)
    os.fsync(the_file(tmp_path))
    with pytest.raises(
        SwapError,
        match=rf"the master of 'a' was changed on the disk: .*\.swap, byte {4096 + block * BLOCK_BYTES} on",
    ):
        store.load(A, torch.empty_like(values)).wait()
    store.close()


def test_a_file_that_was_truncated_is_found(tmp_path: Path) -> None:
    store = NVMeStore(tmp_path)
    store.reserve([item(A, 1 << 20)])
    store.store(A, torch.ones(1 << 20)).wait()
    os.ftruncate(the_file(tmp_path), 1 << 20)
    with pytest.raises(OSError, match=r"\.swap"):
        store.load(A, torch.empty(1 << 20)).wait()
    store.close()


def test_a_disk_without_room_is_refused_with_the_numbers(tmp_path: Path) -> None:
    store = NVMeStore(tmp_path)
    with pytest.raises(
        OSError, match=r"needs 4096.000 GiB for this rank, and \d+\.\d+ GiB are free"
    ) as caught:
        store.reserve([item(B, 10), item(A, 1 << 40)])
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path)
    assert not list(tmp_path.iterdir())
    store.reserve([item(A, 10)])
    store.close()


def test_folders_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="does not exist: create it, or name another"):
        NVMeStore(tmp_path / "missing").reserve([item(A, 10)])


def test_kinds_may_be_on_different_disks_and_on_the_host(tmp_path: Path) -> None:
    fast, slow = tmp_path / "fast", tmp_path / "slow"
    fast.mkdir()
    slow.mkdir()
    store = NVMeStore({"master": fast, "state": slow}, host=("grad",))
    grad = ShardKey(name="a", kind="grad")
    mapped = store.reserve([item(A, 100), item(grad, 100), item(ShardKey(name="a", kind="state"), 100)])
    assert mapped.keys() == {grad}
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert any(str(fast) in link for link in links) and any(str(slow) in link for link in links)
    store.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_a_gradient(tmp_path: Path, dtype: torch.dtype) -> None:
    store = NVMeStore(tmp_path)
    key = ShardKey(name="a", kind="grad")
    store.reserve([item(key, 700_000, dtype)])
    expected = torch.zeros(700_000)
    torch.manual_seed(0)
    for accumulate in (False, True, True):
        for begin, end in ((0, 300_001), (300_001, 300_002), (300_002, 700_000)):
            part = torch.randn(end - begin)
            store.sink_grad(key, part, offset=begin, accumulate=accumulate).wait()
            old = expected[begin:end] if accumulate else torch.zeros(end - begin)
            expected[begin:end] = (old + part).to(dtype).float()
    out = torch.empty(700_000, dtype=dtype)
    store.load(key, out).wait()
    assert torch.equal(out.float(), expected)
    store.close()


def test_what_each_setting_of_verify_detects() -> None:
    blocks = 64
    data = torch.arange(blocks * BLOCK_BYTES // 8).view(torch.uint8)
    for verify, least, most in (("off", 0, 0), ("sampled", 5, 7), ("full", blocks, blocks)):
        sums = BlockSums(data.numel(), verify)  # type: ignore[arg-type]
        sums.written(0, data)
        assert sums.first_difference(0, data) is None
        found = 0
        for block in range(blocks):
            data[block * BLOCK_BYTES + 17] ^= 1
            found += sums.first_difference(0, data) == block * BLOCK_BYTES
            data[block * BLOCK_BYTES + 17] ^= 1
        assert least <= found <= most
    seen = set()
    sums = BlockSums(data.numel(), "sampled")
    for _ in range(16):
        sums.written(0, data)
        seen |= sums._sums.keys()
    assert seen == set(range(blocks)), "some blocks are never checked"
    sums = BlockSums(data.numel() - 5, "full")
    sums.written(BLOCK_BYTES // 2, data[: 2 * BLOCK_BYTES])
    assert list(sums._sums) == [1]


def test_options_reach_the_engine(tmp_path: Path) -> None:
    store = NVMeStore(
        tmp_path,
        options=NVMeOptions(
            backend="threads", block_bytes=1 << 16, queue_depth=3, num_threads=2, direct=False
        ),
    )
    store.reserve([item(A, 1 << 20)])
    engine = store._engine
    assert engine is not None and engine.backend == "threads"
    values = torch.randn(1 << 20)
    store.store(A, values).wait()
    out = torch.empty_like(values)
    store.load(A, out).wait()
    assert torch.equal(out, values)
    store.close()


@pytest.mark.parametrize("numel", [1 << 20, 1000])
def test_buffers_begin_at_pages_and_large_ones_take_no_more_than_their_size(
    tmp_path: Path, numel: int
) -> None:
    store = NVMeStore(tmp_path)
    before = arena.stats().in_use_bytes
    buffers = [store.staging(numel, torch.float32, torch.device("cpu")) for _ in range(3)]
    taken = arena.stats().in_use_bytes - before
    assert all(buffer.data_ptr() % 4096 == 0 and buffer.numel() == numel for buffer in buffers)
    # Even a few bytes more each would leave gaps in the arena's slabs of 32 MiB, which fit two pages of 16 MiB.
    assert taken == 3 * 4 * numel or numel == 1000
    store.close()
