"""A save that fails on any rank fails on all of them alike, leaves nothing behind, and what was there before
still loads."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import ds_engine
from ds_checkpoint.disk import synced
from ds_checkpoint.format import datafile
from ds_engine import CheckpointError, checkpoint
from engine import jobs
from harness import ranks


def job() -> ds_engine.Engine:
    made = jobs.engine(3)
    made.progress.write = lambda line: None
    return made


def expect_failure(engine: ds_engine.Engine, root: Path, wanted: str) -> None:
    """Saving fails with the same text on every rank; the directory is as it was; training and saving go
    on."""
    before = sorted(p.name for p in root.iterdir())
    with pytest.raises(CheckpointError, match=wanted) as caught:
        engine.save_checkpoint(root, "next")
    texts = [""] * dist.get_world_size()
    dist.all_gather_object(texts, str(caught.value))
    assert len(set(texts)) == 1
    assert sorted(p.name for p in root.iterdir()) == before
    dist.barrier()


def goes_on(engine: ds_engine.Engine, root: Path) -> None:
    other = jobs.engine(1, seed=4)
    other.progress.write = lambda line: None
    other.load_checkpoint(root)
    assert other.global_steps == 1
    jobs.train(engine, 1)
    engine.save_checkpoint(root)
    other.load_checkpoint(root)
    assert other.global_steps == 2


@contextlib.contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Writing beyond it fails with EFBIG, as ENOSPC does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@ranks(2)
@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_rank_that_cannot_write_its_file(tmp_path: Path, bad_rank: int) -> None:
    engine = job()
    jobs.train(engine, 1)
    engine.save_checkpoint(tmp_path)
    with file_size_limit(4096) if dist.get_rank() == bad_rank else contextlib.nullcontext():
        expect_failure(
            engine,
            tmp_path,
            rf"failed on 1 of 2 ranks; rank {bad_rank}: OSError: .*File too "
            "large",
        )
    goes_on(engine, tmp_path)


@ranks(2)
@pytest.mark.parametrize("file", ["manifest.json", "latest"])
def test_a_file_of_rank_0_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    engine = job()
    jobs.train(engine, 1)
    engine.save_checkpoint(tmp_path)
    write_synced = synced.write_synced

    def full(path: Path, content: bytes) -> None:
        if path.name.startswith(file):
            path.write_bytes(content[:5])
            raise OSError(28, "No space left on device")
        write_synced(path, content)

    monkeypatch.setattr(synced, "write_synced", full)
    expect_failure(engine, tmp_path, r"rank 0: OSError: .*No space left on device")
    monkeypatch.undo()
    goes_on(engine, tmp_path)


@ranks(2)
def test_a_rename_that_fails_gives_the_old_name_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = job()
    jobs.train(engine, 1)
    engine.save_checkpoint(tmp_path, "next")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.startswith("next.tmp-"):
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    expect_failure(engine, tmp_path, r"rank 0: PermissionError")
    monkeypatch.undo()
    goes_on(engine, tmp_path)


@ranks(2)
def test_any_error_on_a_rank_is_told_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = job()
    jobs.train(engine, 1)
    engine.save_checkpoint(tmp_path)
    if dist.get_rank() == 1:

        def broken(*_: object, **__: object) -> None:
            raise ZeroDivisionError("a mistake of ours")

        monkeypatch.setattr(datafile, "write", broken)
    expect_failure(engine, tmp_path, r"rank 1: ZeroDivisionError: a mistake of ours")
    monkeypatch.undo()
    goes_on(engine, tmp_path)


@ranks(2)
def test_ranks_with_different_tags(tmp_path: Path) -> None:
    engine = job()
    with pytest.raises(CheckpointError, match=r"rank 1: ValueError: tag 'tag1' here, 'tag0' on rank 0"):
        engine.save_checkpoint(tmp_path, f"tag{dist.get_rank()}")
    dist.barrier()
    assert list(tmp_path.iterdir()) == []


@ranks(2)
def test_a_rank_that_does_not_see_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = job()
    if dist.get_rank() == 1:
        monkeypatch.setattr(Path, "is_dir", lambda self: False)
    with pytest.raises(
        CheckpointError,
        match=r"rank 1: .*this rank does not see it: save to a file system "
        "that all ranks share",
    ):
        engine.save_checkpoint(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=False, capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("needs the right to mount a tmpfs of 256 kB")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill_up(disk: Path, leave_kb: int) -> None:
    """Leave that much room on a disk, on rank 0 for all."""
    if dist.get_rank() == 0:
        ballast = disk / "ballast"
        ballast.unlink(missing_ok=True)
        if leave_kb < 256:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            os.truncate(ballast, ballast.stat().st_size - 1024 * leave_kb)
    dist.barrier()


def checkpoints_in(root: Path) -> list[str]:
    dist.barrier()
    return sorted(p.name for p in root.iterdir() if p.name != "ballast")


def same_on_all_ranks(text: str) -> bool:
    texts = [""] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return len(set(texts)) == 1


@ranks(2)
@pytest.mark.parametrize("background", [False, True], ids=["now", "background"])
def test_a_disk_that_is_full_sooner_or_later(small_disk: Path, background: bool) -> None:
    """From no room at all to enough for everything: each save is complete, or told on every rank and not there."""
    more = {"checkpoint": {"writer": {"decoupled": True}}} if background else {}
    engine = jobs.engine(3, **more)
    engine.progress.write = lambda line: None
    jobs.train(engine, 1)
    engine.save_checkpoint(small_disk, "good")
    engine.wait_for_checkpoint()
    outcomes = []
    for leave_kb in [*range(0, 88, 8), 256]:
        fill_up(small_disk, leave_kb)
        before = checkpoints_in(small_disk)
        text = ""
        try:
            engine.save_checkpoint(small_disk, "next")
            jobs.train(engine, 1)  # goes on, whatever becomes of the save
            engine.wait_for_checkpoint()
        except CheckpointError as error:
            text = str(error)
        assert same_on_all_ranks(text)
        outcomes.append(not text)
        if text:
            assert "No space left on device" in text
            assert checkpoints_in(small_disk) == before and checkpoint.latest(small_disk) == "good"
            jobs.train(engine, 1)
        else:
            assert checkpoints_in(small_disk) == ["good", "latest", "next"]
            fill_up(small_disk, 256)
            engine.save_checkpoint(small_disk, "good")
            engine.wait_for_checkpoint()
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(small_disk / "next")
        dist.barrier()
        with checkpoint.open_checkpoint(small_disk) as opened:
            assert list(opened.verify()) == []
    assert not outcomes[0] and outcomes[-1] and outcomes == sorted(outcomes)
    engine.destroy()


@ranks(2)
@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_rank_that_cannot_write_in_the_background(tmp_path: Path, bad_rank: int) -> None:
    engine = jobs.engine(3, checkpoint={"writer": {"decoupled": True}})
    said: list[str] = []
    assert engine.savers.background is not None
    engine.savers.background._say = said.append
    jobs.train(engine, 1)
    engine.save_checkpoint(tmp_path)
    engine.wait_for_checkpoint()
    before = checkpoints_in(tmp_path)
    with file_size_limit(4096) if dist.get_rank() == bad_rank else contextlib.nullcontext():
        engine.save_checkpoint(tmp_path, "next")
        jobs.train(engine, 1)
        with pytest.raises(CheckpointError, match=rf"rank {bad_rank}: OSError: .*File too large") as caught:
            engine.wait_for_checkpoint()
    assert same_on_all_ranks(str(caught.value))
    assert len(said) == (1 if dist.get_rank() == 0 else 0)
    assert checkpoints_in(tmp_path) == before
    engine.destroy()
    goes_on(engine_again(), tmp_path)


def engine_again() -> ds_engine.Engine:
    made = job()
    jobs.train(made, 1)
    return made


@ranks(2)
def test_a_checkpoint_that_one_rank_cannot_open(tmp_path: Path) -> None:
    engine = job()
    path = Path(engine.save_checkpoint(tmp_path))
    if dist.get_rank() == 0:
        (path / "rank-00001-of-00002.safetensors").unlink()
    dist.barrier()
    with pytest.raises(
        CheckpointError,
        match=r"rank 1: .*rank-00001-of-00002.safetensors cannot be "
        "opened",
    ):
        engine.load_checkpoint(tmp_path)
    assert torch.isfinite(torch.tensor(jobs.train(engine, 1))).all()
