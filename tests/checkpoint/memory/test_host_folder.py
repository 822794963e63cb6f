"""The folder of a job on one host: whose it is, what is left in it, and when it is removed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ds_checkpoint import CheckpointError
from ds_checkpoint.memory import capacity, host_folder
from ds_checkpoint.memory.host_folder import HostFolder, Needs, folder_of, job_name, remove_dead
from ds_engine.launch import copies as launcher


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(host_folder.BASE, str(tmp_path))
    monkeypatch.setattr(host_folder, "LOCK_S", 0.2)
    for name in (host_folder.JOB, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_the_name_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="this one has none: start it by `ds run`"):
        job_name(None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun without --rdzv-id
    with pytest.raises(ValueError, match="has none"):
        job_name(None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run7")
    assert job_name(None) == "run7"
    monkeypatch.setenv(host_folder.JOB, "mine")
    assert job_name(None) == "mine" and job_name("other") == "other"
    for bad in ("../x", "a/b", ".hidden", "x" * 101):
        with pytest.raises(ValueError, match="letters, digits"):
            job_name(bad)


def test_the_launcher_removes_the_folder_that_ranks_use(base: Path) -> None:
    environ = {host_folder.BASE: str(base), host_folder.JOB: "mine"}
    HostFolder(folder_of("mine")).close()
    HostFolder(folder_of("other")).close()
    assert launcher.folder_of(environ) == folder_of("mine")
    launcher.remove(environ)
    assert list(base.iterdir()) == [folder_of("other")]
    for bad in ("", "../x", "ds-copies/../.."):
        assert launcher.folder_of({**environ, host_folder.JOB: bad}) is None
        launcher.remove({**environ, host_folder.JOB: bad})
    assert list(base.iterdir()) == [folder_of("other")]


def test_what_was_half_written_is_removed_and_never_read(base: Path) -> None:
    path = folder_of("mine")
    (path / "copy00000003.tmp-").mkdir(parents=True)
    (path / "copy00000003.tmp-" / "manifest.json").write_text("{}")
    path.chmod(0o700)
    folder = HostFolder(path)
    assert list(path.iterdir()) == [] and folder.generations() == {} and folder.largest_sequence() == 0
    (path / "copy00000004").mkdir()  # its manifest is damaged
    (path / "copy00000004" / "manifest.json").write_text("{}")
    assert folder.generations() == {} and folder.largest_sequence() == 4, "its number is not used again"
    assert path.stat().st_mode & 0o777 == 0o700
    folder.close()


def test_two_jobs_with_one_name(base: Path) -> None:
    first = HostFolder(folder_of("mine"))
    with pytest.raises(CheckpointError, match="another job on this host has the same name; set DS_JOB"):
        HostFolder(folder_of("mine"))
    HostFolder(folder_of("other")).close()
    first.close()
    HostFolder(folder_of("mine")).close()


def test_a_folder_of_somebody_else(base: Path) -> None:
    folder_of("mine").mkdir(mode=0o755)
    with pytest.raises(CheckpointError, match="not a folder that only this user can read"):
        HostFolder(folder_of("mine"))
    folder_of("linked").symlink_to(base)
    with pytest.raises(CheckpointError, match="not a folder that only this user can read"):
        HostFolder(folder_of("linked"))


def test_a_base_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(host_folder.BASE, "/nowhere")
    with pytest.raises(CheckpointError, match="/nowhere does not exist: set DS_MEMORY_FOLDER"):
        HostFolder(folder_of("mine"))


def test_folders_of_dead_jobs_are_removed_and_those_between_two_starts_are_not(base: Path) -> None:
    own, running = HostFolder(folder_of("own")), HostFolder(folder_of("running"))
    for name in ("dead", "restarting"):
        HostFolder(folder_of(name)).close()

    def seen(now_s: float) -> set[str]:
        remove_dead(base, own.path, now_s)
        return {path.name.rpartition("-")[2] for path in base.iterdir()}

    everything = {"own", "running", "dead", "restarting"}
    assert seen(1000.0) == everything, "the first look only notes the time"
    assert seen(1000.0 + host_folder.DEAD_S) == everything
    again = HostFolder(folder_of("restarting"))  # within the time
    assert seen(1001.0 + host_folder.DEAD_S) == everything - {"dead"}
    again.close()
    assert seen(1002.0 + host_folder.DEAD_S) == everything - {"dead"}, "its time begins anew"
    for folder in (own, running):
        folder.close()


def test_the_memory_that_two_generations_need(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = HostFolder(folder_of("mine"))
    (folder.path / "copy00000001").mkdir()
    (folder.path / "copy00000001" / "rank").write_bytes(b"x" * 30)
    monkeypatch.setattr(capacity, "free_bytes", lambda path: (30, "the memory of the machine"))
    folder.check_free(Needs(own=20, copied=10))  # 2 x 30, of which 30 are there
    with pytest.raises(CheckpointError) as raised:
        folder.check_free(Needs(own=21, copied=10))
    said = f"62 bytes are needed in {base}, 2 x (21 of its own ranks + 10 of other hosts)"
    assert said in str(raised.value) and "the memory of the machine leaves 60: enlarge it" in str(
        raised.value
    )
    other = HostFolder(folder_of("other"))
    (other.path / "x").write_bytes(b"x" * 7)
    with pytest.raises(CheckpointError, match=f"{other.path} has 7 bytes of another job"):
        folder.check_free(Needs(own=21, copied=10))
    for each in (folder, other):
        each.close()


def test_what_limits_the_memory(tmp_path: Path) -> None:
    """The smallest of: the file system, the machine's memory, and every cgroup above this process."""

    def free(meminfo: str, groups: dict[str, tuple[str, int, int]]) -> tuple[int, str]:
        (tmp_path / "proc/self").mkdir(parents=True, exist_ok=True)
        (tmp_path / "proc/meminfo").write_text(meminfo)
        (tmp_path / "proc/self/cgroup").write_text("0::/job/task\n")
        for name, (limit, used, inactive) in groups.items():
            group = tmp_path / "sys/fs/cgroup" / name
            group.mkdir(parents=True, exist_ok=True)
            (group / "memory.max").write_text(limit)
            (group / "memory.current").write_text(str(used))
            (group / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")
        return capacity.free_bytes(tmp_path, tmp_path)

    there = os.statvfs(tmp_path)
    space, limit = free("", {})
    assert limit == f"the file system of {tmp_path}" and 0 < space <= there.f_blocks * there.f_frsize
    assert free("MemFree: 1 kB\nMemAvailable: 3 kB\n", {}) == (3072, "the memory of the machine")
    cgroup = "the memory limit of the cgroup"
    assert free("MemAvailable: 3 kB\n", {"job/task": ("2000", 1500, 100)}) == (600, cgroup)
    assert free("MemAvailable: 3 kB\n", {"job/task": ("max", 1500, 100), "job": ("500", 450, 0)}) == (
        50,
        cgroup,
    )
    assert free("MemAvailable: 3 kB\n", {"job": ("500", 600, 0)}) == (0, cgroup)
