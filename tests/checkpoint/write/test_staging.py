"""A checkpoint is complete or absent, wherever a save stops; what dead saves leave is cleared away, and
nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

import ds_checkpoint as checkpoint
from ds_checkpoint import Checkpoint, CheckpointError
from ds_checkpoint.disk import synced
from ds_checkpoint.format import folder
from ds_checkpoint.write import Content, staging, write
from ds_checkpoint.write.staging import Staging


class _DiedError(BaseException):
    """Stands for the process's death: nothing that runs afterwards may tidy up."""


def save(root: Path, tag: str, value: float = 0.0, keep_last: int | None = None) -> Path:
    record = _Record(torch.full((4,), value))
    return Path(write(root, tag, lambda: Content(records=[record]), keep_last=keep_last))


class _Record:
    fqn, state, global_shape, flat_offset = "w", "param", (4,), 0
    coordinates: Mapping[str, tuple[int, int]] = {}

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data


def value_of(root: Path, tag: str | None = None) -> float:
    with Checkpoint(checkpoint.find(root, tag)) as opened:
        return float(opened.tensor("w")[0])


def test_latest_follows_saves(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "run"
    assert checkpoint.latest(root) is None
    for step in (1, 2, 10):
        path = save(root, f"global_step{step}", step)
        assert path == root / f"global_step{step}"
        assert checkpoint.latest(root) == f"global_step{step}"
        assert (root / "latest").read_text() == f"global_step{step}"
        assert value_of(root) == step
    assert value_of(root, "global_step2") == 2


def test_a_tag_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, "best", 1)
    save(tmp_path, "best", 2)
    assert value_of(tmp_path) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "latest"]


def die_before(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process die right before the n-th change on disk of the next save."""
    count = 0

    def counted(original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal count
            if count == step:
                raise _DiedError
            count += 1
            return original(*args, **kwargs)

        return call

    for owner, name in (
        (Path, "mkdir"),
        (Path, "rename"),
        (synced, "sync"),
        (synced, "write_synced"),
        (staging.shutil, "rmtree"),
    ):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    monkeypatch.setattr(Staging, "abort", lambda self: os.close(self._lock))  # a dead process holds no lock


@pytest.mark.parametrize("replace", [False, True], ids=["new tag", "same tag"])
@pytest.mark.parametrize("step", range(13))
def test_death_at_any_step_leaves_a_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, replace: bool
) -> None:
    save(tmp_path, "first", 1)
    tag = "first" if replace else "second"
    die_before(step, monkeypatch)
    died = False
    try:
        save(tmp_path, tag, 2)
    except _DiedError:
        died = True
    monkeypatch.undo()
    # make both folders, manifest, sync; old away; new in place, sync; pointer, its rename, sync; old loses
    # its name and goes
    assert died == (step < (12 if replace else 9))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert value_of(tmp_path) in (1, 2)
    # The next save clears up whatever is left, and what it did not finish is not lost.
    save(tmp_path, "third", 3)
    names = {p.name for p in tmp_path.iterdir() if not p.name.startswith("latest.tmp-")}
    assert names in ({"first", "third", "latest"}, {"first", "second", "third", "latest"})
    assert value_of(tmp_path) == 3
    assert value_of(tmp_path, "first") in ((1, 2) if replace else (1,))


def test_a_folder_that_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    alive = Staging(tmp_path, "other")
    save(tmp_path, "mine", 1)
    assert alive.path.is_dir()
    alive.abort()
    assert not alive.path.exists()


def test_dead_folders_are_removed_and_foreign_things_are_not(tmp_path: Path) -> None:
    dead = tmp_path / "global_step3.tmp-12345678"
    dead.mkdir()
    (dead / "rank-00000-of-00001.safetensors").write_bytes(b"half")
    pointer = tmp_path / "latest.tmp-12345678"
    pointer.write_text("x")
    os.utime(pointer, (time.time() - 60,) * 2)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "tensorboard").mkdir()
    save(tmp_path, "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "latest", "notes.txt", "tensorboard"]


def test_what_is_no_checkpoint_is_never_touched(tmp_path: Path) -> None:
    mine = tmp_path / "best"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(
        CheckpointError, match=r"best exists and is not a checkpoint of ds-checkpoint: choose another tag"
    ):
        save(tmp_path, "best")
    save(tmp_path, "good")
    for name in ("good.old-2024", "good.old-00000000", "good.tmp-backup", "latest.old"):
        (tmp_path / name).mkdir()
    save(tmp_path, "good", 2, keep_last=1)
    names = {"best", "good", "good.old-2024", "good.old-00000000", "good.tmp-backup", "latest", "latest.old"}
    assert {p.name for p in tmp_path.iterdir()} == names
    assert (mine / "thesis.tex").exists()


def test_without_locks_age_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_lock", lambda path: None)
    young, old = tmp_path / "a.tmp-00000001", tmp_path / "b.tmp-00000002"
    for path in (young, old):
        path.mkdir()
    os.utime(old, (time.time() - 1000,) * 2)
    save(tmp_path, "c")
    assert young.exists() and not old.exists()


def test_the_newest_is_taken_where_latest_is_wrong(tmp_path: Path) -> None:
    for step in (9, 10, 1):  # saved in this order: names say nothing about age
        save(tmp_path, f"step{step}", step)
    (tmp_path / "latest").write_text("step77")
    with pytest.warns(
        UserWarning, match=r"'latest' names 'step77', which does not exist; .* 'step1', is loaded"
    ):
        assert value_of(tmp_path) == 1
    (tmp_path / "latest").unlink()
    with pytest.warns(UserWarning, match=r"there is no file 'latest'"):
        assert value_of(tmp_path) == 1
    assert checkpoint.latest(tmp_path) == "step1"


def test_the_newest_is_a_sound_one(tmp_path: Path) -> None:
    save(tmp_path, "good", 1)
    (save(tmp_path, "bad", 2) / "manifest.json").write_text("{}")
    (tmp_path / "latest").unlink()
    with pytest.warns(UserWarning, match=r"'good', is loaded"):
        assert value_of(tmp_path) == 1


@pytest.mark.parametrize("keep_last", [1, 2, 3, 9])
def test_pruning_keeps_the_newest(tmp_path: Path, keep_last: int) -> None:
    (tmp_path / "mine").mkdir()
    for step in (5, 30, 4, 20, 3):
        save(tmp_path, f"step{step}", step, keep_last=keep_last)
    left = {p.name for p in tmp_path.iterdir()} - {"latest", "mine"}
    assert left == {f"step{s}" for s in (5, 30, 4, 20, 3)[-keep_last:]}
    assert (tmp_path / "mine").is_dir()
    assert value_of(tmp_path) == 3


def test_pruning_that_fails_does_not_fail_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, "a")

    def refuse(*_: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(staging, "remove", refuse)
    with pytest.warns(UserWarning, match=r"could not be removed: not yours"):
        save(tmp_path, "b", 2, keep_last=1)
    assert value_of(tmp_path) == 2


@pytest.mark.parametrize("tag", ["", ".", "..", "a/b", "latest", "x.tmp-1", "x.old-1", "a\0b"])
def test_tags_that_cannot_be(tmp_path: Path, tag: str) -> None:
    with pytest.raises(CheckpointError, match=r"cannot name a checkpoint"):
        save(tmp_path, tag)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_explained(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with pytest.raises(
        FileNotFoundError,
        match=r"no checkpoint in .*/nowhere/run: there is no such "
        "directory; .* does not exist either",
    ):
        checkpoint.find(tmp_path / "nowhere" / "run", None)
    (tmp_path / "runs").mkdir()
    with pytest.raises(FileNotFoundError, match=r"there is no such directory; .* has runs"):
        checkpoint.find(root, None)
    root.mkdir()
    with pytest.raises(FileNotFoundError, match=r"it is empty"):
        checkpoint.find(root, None)
    (root / "events").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"it contains events, none of which is a complete checkpoint"
    ):
        checkpoint.find(root, None)
    save(root, "global_step5")
    with pytest.raises(
        FileNotFoundError,
        match=r"no checkpoint 'global_step6' in .*: complete ones are "
        "global_step5",
    ):
        checkpoint.find(root, "global_step6")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"saving .* failed: (FileExists|NotADirectory)Error"):
        save(tmp_path / "file", "a")


# --- links, clocks, other jobs


def test_a_save_over_a_link_replaces_the_link(tmp_path: Path) -> None:
    save(tmp_path, "a", 1)
    (tmp_path / "best").symlink_to("a")
    assert value_of(tmp_path, "best") == 1
    save(tmp_path, "best", 2)
    assert value_of(tmp_path, "best") == 2 and value_of(tmp_path, "a") == 1
    assert not (tmp_path / "best").is_symlink()
    for number in range(3):
        save(tmp_path, f"b{number}", number)
    (tmp_path / "gone").symlink_to("nothing")
    with pytest.raises(CheckpointError, match="gone exists and is not a checkpoint of ds-checkpoint"):
        save(tmp_path, "gone")


def test_what_a_link_points_to_is_not_pruned(tmp_path: Path) -> None:
    save(tmp_path, "a", 1)
    (tmp_path / "best").symlink_to("a")
    for number in range(3):
        save(tmp_path, f"b{number}", number, keep_last=1)
    assert value_of(tmp_path, "best") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"a", "best", "b2", "latest"}


def test_a_clock_that_is_set_back_changes_no_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 2e9
    monkeypatch.setattr("time.time", lambda: clock)
    for number in range(4):
        clock -= 1000
        save(tmp_path, f"s{number}", number, keep_last=2)
    assert {p.name for p in tmp_path.iterdir()} == {"s2", "s3", "latest"}
    (tmp_path / "latest").unlink()
    with pytest.warns(UserWarning, match="'s3', is loaded"):
        assert value_of(tmp_path) == 3


def test_checkpoints_from_before_there_was_a_sequence_are_ordered_by_time(tmp_path: Path) -> None:
    golden = Path(__file__).resolve().parents[2] / "golden" / "checkpoints" / "version1" / "plain" / "saved"
    shutil.copytree(golden, tmp_path / "old")
    save(tmp_path, "new", 1)
    assert folder.by_age(tmp_path) == ["old", "new"]


def test_pruning_goes_on_where_somebody_else_removes_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        save(tmp_path, f"s{number}", number)
    by_age = folder.by_age

    def another_job(root: Path) -> list[str]:
        tags = by_age(root)
        shutil.rmtree(root / tags[0])
        return tags

    monkeypatch.setattr(folder, "by_age", another_job)
    save(tmp_path, "s3", 3, keep_last=2)
    assert {p.name for p in tmp_path.iterdir()} == {"s2", "s3", "latest"}


def test_pruning_reads_the_beginnings_of_manifests_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        save(tmp_path, f"s{number}", number)
    monkeypatch.setattr(folder, "read_manifest", lambda path: pytest.fail("read whole"))
    staging.prune(tmp_path, 2, "s3")
    assert {p.name for p in tmp_path.iterdir()} == {"s2", "s3", "latest"}


def test_two_jobs_save_into_one_directory(tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from ds_checkpoint.format.records import Record\n"
        "from ds_checkpoint.write import Content, write\n"
        "record = Record('w', 'param', (4,), 0, torch.zeros(4))\n"
        "for number in range(25):\n"
        "    tag = f'{sys.argv[2]}{number}' if number % 2 else 'shared'\n"
        "    write(sys.argv[1], tag, lambda: Content(records=[record]), keep_last=3)\n"
    )
    jobs = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", code, tmp_path, name], stderr=subprocess.PIPE)
        for name in ("a", "b")
    ]
    for job in jobs:
        _, said = job.communicate(timeout=120)
        assert job.returncode == 0, said.decode()[-1000:]
    assert not [p for p in tmp_path.iterdir() if ".tmp-" in p.name or ".old-" in p.name]
    assert value_of(tmp_path) == 0


def test_latest_that_is_a_folder(tmp_path: Path) -> None:
    save(tmp_path, "a", 1)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    with pytest.warns(UserWarning, match="'latest' is a folder; .* 'a', is loaded"):
        assert value_of(tmp_path) == 1
    with pytest.raises(CheckpointError, match="latest is a folder, but a file"):
        save(tmp_path, "b", 2)
    (tmp_path / "latest").rmdir()
    (tmp_path / "latest").symlink_to("a")
    assert value_of(tmp_path) == 1
    save(tmp_path, "b", 2)
    assert value_of(tmp_path) == 2 and value_of(tmp_path, "a") == 1


@pytest.mark.parametrize("content", [b"\xff\xfe\xfa", b"x" * 5000, b"a\0b", b""])
def test_latest_that_holds_anything(tmp_path: Path, content: bytes) -> None:
    save(tmp_path, "a", 1)
    (tmp_path / "latest").write_bytes(content)
    with pytest.warns(UserWarning, match="which does not exist"):
        assert value_of(tmp_path) == 1


def test_a_tag_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it has 300 bytes, but at most 240 are allowed"):
        save(tmp_path, "x" * 300)
    save(tmp_path, "y" * 240, 1)
    save(tmp_path, "y" * 240, 2, keep_last=1)
    assert value_of(tmp_path) == 2
    with pytest.raises(FileNotFoundError, match="no checkpoint 'x"):
        checkpoint.find(tmp_path, "x" * 300)
