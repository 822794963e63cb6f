"""Copies in the memory of hosts: two ranks play a host, each host with a folder of its own."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_checkpoint
from checkpoint.test_api import make, same, train, whole
from ds_checkpoint import CheckpointError, MemoryCopies
from ds_checkpoint.memory import copies as module
from ds_checkpoint.memory import host_folder, transfer
from harness import ranks


@contextmanager
def job(folder: Path, hosts: Sequence[str], copies: int = 1, name: str = "job") -> Iterator[MemoryCopies]:
    """A start of the job with each rank on a host."""
    host = hosts[dist.get_rank()]
    (folder / host).mkdir(exist_ok=True)
    with (
        patch.object(socket, "gethostname", lambda: host),
        patch.object(module, "_boot_id", lambda: host),
        patch.dict(os.environ, {host_folder.BASE: str(folder / host)}),
    ):
        made = MemoryCopies(copies, job=name)
        try:
            yield made
        finally:
            made.close()


def lose(folder: Path, *hosts: str) -> None:
    """All memory of these hosts is lost."""
    dist.barrier()
    if dist.get_rank() == 0:
        for host in hosts:
            shutil.rmtree(folder / host)
    dist.barrier()


def generations(folder: Path, host: str) -> list[str]:
    return sorted(path.name for path in (folder / host).glob("ds-copies-*/*"))


def files(folder: Path, host: str) -> list[str]:
    return sorted(path.name[:10] for path in (folder / host).glob("ds-copies-*/copy*/rank-*"))


@ranks(4, groups_may_stay=True)
@pytest.mark.parametrize(
    ("kind", "lost", "again"),
    [
        ("zero3", "b", "aacc"),  # a spare takes its place
        ("fsdp", "a", "bccb"),  # the host of rank 0
        ("plain", "b", "aaaa"),  # the job shrinks to one host
        ("zero1", "", "baab"),  # ranks move to other hosts
    ],
)
def test_a_job_goes_on_from_the_memory_of_the_hosts_that_are_left(
    kind: str, lost: str, again: str, tmp_path: Path
) -> None:
    model, optimizer = make(kind)
    train(kind, model, optimizer, range(2))
    disk = ds_checkpoint.save(tmp_path / "disk", model, optimizer, {"step": 2})
    with job(tmp_path, "aabb") as copies:
        for step in range(2, 5):
            train(kind, model, optimizer, range(step, step + 1))
            ds_checkpoint.save_copy(copies, model, optimizer, {"step": step + 1})
            dist.barrier()
            for host in "ab":
                assert generations(tmp_path, host) == [f"copy{step - 1:08d}"]
                assert files(tmp_path, host) == [f"rank-0000{rank}" for rank in range(4)]
    train(kind, model, optimizer, range(5, 7))
    expected = whole(kind, model, optimizer)
    lose(tmp_path, *lost)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(tmp_path / "disk")
    dist.barrier()
    assert not Path(disk).exists()

    other, other_optimizer = make(kind, seed=9)
    one_host = patch("warnings.warn") if len(set(again)) == 1 else nullcontext()
    with one_host, job(tmp_path, again) as copies:
        extra = ds_checkpoint.resume(tmp_path / "disk", copies, other, other_optimizer)
        assert extra == {"step": 5}
        train(kind, other, other_optimizer, range(5, 7))
        same(whole(kind, other, other_optimizer), expected)
        ds_checkpoint.save_copy(copies, other, other_optimizer)
        dist.barrier()
        assert generations(tmp_path, again[0]) == ["copy00000004"], "it goes on counting"


@ranks(4, groups_may_stay=True)
def test_the_newer_one_of_memory_and_disk(tmp_path: Path) -> None:
    model, optimizer = make("plain")
    with job(tmp_path, "aabb") as copies:
        assert ds_checkpoint.resume(tmp_path / "disk", copies, model, optimizer) is None
        ds_checkpoint.save_copy(copies, model, optimizer, {"from": "memory"})
        assert ds_checkpoint.resume(tmp_path / "disk", copies, model, optimizer) == {"from": "memory"}
        ds_checkpoint.save(tmp_path / "disk", model, optimizer, {"from": "disk"})
        assert ds_checkpoint.resume(tmp_path / "disk", copies, model, optimizer) == {"from": "disk"}
        assert ds_checkpoint.resume(tmp_path / "disk", None, model, optimizer) == {"from": "disk"}
        ds_checkpoint.save_copy(copies, model, optimizer, {"from": "memory again"})
        assert ds_checkpoint.resume(tmp_path / "disk", copies, model, optimizer) == {"from": "memory again"}
        copies.remove()
    dist.barrier()
    assert list((tmp_path / "a").iterdir()) == list((tmp_path / "b").iterdir()) == []


@ranks(4, groups_may_stay=True)
def test_more_is_lost_than_the_copies_cover(tmp_path: Path) -> None:
    model, optimizer = make("plain")
    ds_checkpoint.save(tmp_path / "disk", model, optimizer, {"from": "disk"})
    with job(tmp_path, "abcd") as copies:
        ds_checkpoint.save_copy(copies, model, optimizer, {"from": "memory"})
    lose(tmp_path, "b", "c")
    with job(tmp_path, "adda") as copies:
        said = (
            pytest.warns(UserWarning, match=r"rank-00001-of-00004.safetensors \(was on b and c\)")
            if dist.get_rank() == 0
            else nullcontext()
        )
        with said:
            assert ds_checkpoint.resume(tmp_path / "disk", copies, model, optimizer) == {"from": "disk"}


@ranks(4, groups_may_stay=True)
def test_two_copies_survive_two_hosts(tmp_path: Path) -> None:
    model, optimizer = make("zero1")
    train("zero1", model, optimizer, range(2))
    expected = whole("zero1", model, optimizer)
    with job(tmp_path, "abcd", copies=2) as copies:
        ds_checkpoint.save_copy(copies, model, optimizer)
    assert files(tmp_path, "d") == ["rank-00001", "rank-00002", "rank-00003"]
    lose(tmp_path, "b", "c")
    other, other_optimizer = make("zero1", seed=9)
    with job(tmp_path, "adda") as copies:
        assert ds_checkpoint.resume(tmp_path / "disk", copies, other, other_optimizer) == {}
    same(whole("zero1", other, other_optimizer), expected)


@ranks(4, groups_may_stay=True)
def test_a_host_that_comes_back_has_an_older_generation(tmp_path: Path) -> None:
    model, optimizer = make("plain")
    with job(tmp_path, "aabb") as copies:
        ds_checkpoint.save_copy(copies, model, optimizer, {"step": 1})
    with job(tmp_path, "aacc") as copies:  # without b
        assert ds_checkpoint.resume(tmp_path / "disk", copies, model, optimizer) == {"step": 1}
        ds_checkpoint.save_copy(copies, model, optimizer, {"step": 2})
    assert generations(tmp_path, "b") == ["copy00000001"], "complete, and old"
    with job(tmp_path, "bbcc") as copies:
        assert ds_checkpoint.resume(tmp_path / "disk", copies, model, optimizer) == {"step": 2}
        ds_checkpoint.save_copy(copies, model, optimizer, {"step": 3})
        dist.barrier()
        assert generations(tmp_path, "b") == generations(tmp_path, "c") == ["copy00000003"]


class Big(nn.Module):
    """Several blocks of a file, and several chunks of a transfer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(1_500_000, generator=generator))


@ranks(2, groups_may_stay=True)
@pytest.mark.parametrize("where", ["own", "copy", "header", "gone", "both"])
def test_a_damaged_copy_is_not_used(where: str, tmp_path: Path) -> None:
    model, other = Big(1), Big(2)
    with patch.object(transfer, "CHUNK_BYTES", 1 << 20), job(tmp_path, "ab") as copies:
        ds_checkpoint.save_copy(copies, model, extra={"step": 1})
    dist.barrier()
    if dist.get_rank() == 0:
        for host in {"own": "a", "copy": "b", "header": "a", "gone": "a", "both": "ab"}[where]:
            (file,) = (tmp_path / host).glob("ds-copies-*/copy*/rank-00000-*")
            if where == "gone":
                file.unlink()
                continue
            content = bytearray(file.read_bytes())
            content[40 if where == "header" else 3_000_000] ^= 1
            file.write_bytes(content)
    dist.barrier()
    with job(tmp_path, "ab") as copies:
        if where == "both":
            with pytest.raises(CheckpointError, match=r"damaged .*memory of a\).*memory of b\)"):
                ds_checkpoint.resume(tmp_path / "disk", copies, other)
            ds_checkpoint.save(tmp_path / "disk", model, extra={"step": 0})
            newer = replace(copies.newest(), saved_at_s=time.time() + 1e6)
            said = (
                pytest.warns(UserWarning, match="disk/save000001 is")
                if dist.get_rank() == 0
                else nullcontext()
            )
            with said, patch.object(copies, "newest", lambda: newer):
                assert ds_checkpoint.resume(tmp_path / "disk", copies, other) == {"step": 0}
        else:
            assert ds_checkpoint.resume(tmp_path / "disk", copies, other) == {"step": 1}
        assert torch.equal(other.weight, model.weight)


@ranks(4, groups_may_stay=True)
def test_a_copy_that_does_not_arrive_intact_is_not_committed(tmp_path: Path) -> None:
    model, optimizer = make("plain")
    with job(tmp_path, "aabb") as copies:
        ds_checkpoint.save_copy(copies, model, optimizer, {"step": 1})

        def flipped(content: torch.Tensor) -> list[torch.Tensor]:
            changed = content.clone()
            changed[-1] ^= 1
            return [changed]

        with patch.object(transfer, "_parts", flipped) if dist.get_rank() == 3 else nullcontext():
            with pytest.raises(
                CheckpointError, match="rank 1: the copy of rank 3's part did not arrive intact"
            ):
                ds_checkpoint.save_copy(copies, model, optimizer, {"step": 2})
        dist.barrier()
        assert generations(tmp_path, "a") == generations(tmp_path, "b") == ["copy00000001"]
        assert ds_checkpoint.resume(tmp_path / "disk", copies, model, optimizer) == {"step": 1}
        ds_checkpoint.save_copy(copies, model, optimizer, {"step": 3})
        assert ds_checkpoint.resume(tmp_path / "disk", copies, model, optimizer) == {"step": 3}


@ranks(2)
def test_ranks_that_differ(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="rank 1: ValueError: copies is 2 here and 1 on rank 0"):
        with job(tmp_path, "ab", copies=1 + dist.get_rank()):
            pass
    with pytest.raises(ValueError, match="at least 1 is required"):
        MemoryCopies(0)
