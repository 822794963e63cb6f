"""Limits on memory: read from the files of Linux, and named in errors."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from ds_core import host_limits
from ds_core.host_limits import Limit, NotEnoughMemory, Rank, Roots

GIB = 2**30


def roots(folder: Path, cgroup: str, **files: str) -> Roots:
    """A /proc and a /sys/fs/cgroup with the given files; "__" in a name stands for "/"."""
    proc, groups = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    groups.mkdir()
    (proc / "self/cgroup").write_text(cgroup)
    (proc / "self/status").write_text("VmSize:\t1024 kB\nVmData:\t512 kB\nVmLck:\t16 kB\nCapEff:\t0\n")
    (proc / "meminfo").write_text(f"MemTotal: {64 * 2**20} kB\nMemAvailable: {50 * 2**20} kB\n")
    for name, text in files.items():
        path = groups / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Roots(proc=proc, cgroup=groups)


def available(limits: list[Limit]) -> dict[str, int]:
    return {limit.name: limit.available_bytes for limit in limits if "RLIMIT" not in limit.name}


def test_version_2_of_cgroups_and_its_parents(tmp_path: Path) -> None:
    made = roots(
        tmp_path,
        "0::/job/rank\n",
        **{
            "job__rank__memory.max": "max",
            "job__rank__memory.current": "1000",
            "job__memory.max": str(10 * GIB),
            "job__memory.current": str(4 * GIB),
            "job__memory.stat": f"anon 5\ninactive_file {GIB}\n",
        },
    )
    assert available(host_limits.memory_limits(made)) == {
        "MemAvailable of /proc/meminfo": 50 * GIB,
        "memory.max of cgroup /job": 7 * GIB,  # file pages can be dropped
    }


def test_version_1_of_cgroups(tmp_path: Path) -> None:
    made = roots(
        tmp_path,
        "5:cpu,cpuacct:/x\n3:memory:/box\n",
        **{
            "memory__box__memory.limit_in_bytes": str(3 * GIB),
            "memory__box__memory.usage_in_bytes": str(GIB),
            "memory__box__memory.stat": "total_inactive_file 4096\n",
            "memory__memory.limit_in_bytes": "9223372036854771712",
            "memory__memory.usage_in_bytes": str(5 * GIB),
        },
    )
    limits = host_limits.memory_limits(made)
    assert available(limits)["memory.limit_in_bytes of cgroup /box"] == 2 * GIB + 4096
    assert len(available(limits)) == 2, "the root has no limit"


def test_a_path_of_the_host_means_the_root_of_the_container(tmp_path: Path) -> None:
    files = {"memory.max": "1000", "memory.current": "200"}
    made = roots(tmp_path, "0::/docker/abc\n", **files)
    assert available(host_limits.memory_limits(made))["memory.max of cgroup /"] == 800


def test_an_error_has_the_numbers_the_limit_the_rank_and_remedies() -> None:
    limits = [
        Limit(name="plenty", available_bytes=100 * GIB, shared=True, remedy="-"),
        Limit(name="memory.max of cgroup /job", available_bytes=30 * GIB, shared=True, remedy="raise it"),
        Limit(name="ulimit -x", available_bytes=11 * GIB, shared=False, remedy="call ulimit"),
    ]
    host_limits.require("states", 10 * GIB, limits, rank=Rank(number=2, ranks_on_host=3))
    with pytest.raises(NotEnoughMemory) as caught:
        host_limits.require(
            "states", 12 * GIB, limits, rank=Rank(number=2, ranks_on_host=3), instead=["use a disk"]
        )
    assert str(caught.value) == (
        "rank 2 needs 12 GiB (36 GiB for the 3 ranks of this machine) for states, but memory.max of cgroup /job "
        "permits only 30 GiB more; ulimit -x would not permit it either. Raise it; or use a disk"
    )
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert (again.limit, again.needed_bytes, again.available_bytes) == (
        "memory.max of cgroup /job",
        36 * GIB,
        30 * GIB,
    )


def test_locked_memory(tmp_path: Path) -> None:
    script = f"""
import resource
from pathlib import Path
from ds_core.host_limits import Roots, pinned_limits
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
[limit] = pinned_limits(Roots(proc=Path({str(tmp_path / "proc")!r})))
assert limit.name == "RLIMIT_MEMLOCK (ulimit -l)" and limit.available_bytes == (1 << 20) - 16384, limit
status = Path({str(tmp_path / "proc/self/status")!r})
status.write_text(status.read_text().replace("CapEff:\\t0", "CapEff:\\t4000"))
assert not pinned_limits(Roots(proc=Path({str(tmp_path / "proc")!r}))), "CAP_IPC_LOCK locks everything"
"""
    roots(tmp_path, "")
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.parametrize(("name", "option"), [("RLIMIT_AS", "v"), ("RLIMIT_DATA", "d")])
def test_a_real_limit_of_the_process_refuses_before_anything_is_allocated(name: str, option: str) -> None:
    """What the message says is available can be allocated; more than that is refused by us, not by the system."""
    script = f"""
import resource
import torch
from ds_core import arena, host_limits
import ds_offload
from ds_offload.interfaces import PageKey, PageReservation
def used(entry):
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith(entry)).split()[1])
arena.empty(1 << 20)  # what is loaded by the first use is loaded
room = 256 << 20
resource.setrlimit(resource.{name}, (used("Vm{"Size" if name == "RLIMIT_AS" else "Data"}") + room,) * 2)
before = arena.stats().reserved_bytes
def item(num_bytes):
    return PageReservation(key=PageKey(name=str(num_bytes), owner=1), numel=num_bytes, device=torch.device("cpu"))
store = ds_offload.HostStore()
try:
    store.reserve([item(300 << 20)])
    raise SystemExit("not refused")
except host_limits.NotEnoughMemory as error:
    said = str(error)
    assert "300 MiB" in said and "{name} (ulimit -{option})" in said and "rank 0" in said, said
    assert error.available_bytes <= room
assert arena.stats().reserved_bytes == before, "something was allocated"
store.reserve([item(150 << 20)])
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_folders_in_memory(tmp_path: Path) -> None:
    mounts = tmp_path / "proc/self/mounts"
    mounts.parent.mkdir(parents=True)
    mounts.write_text(
        f"disk / ext4 rw 0 0\ntmpfs {tmp_path}/a tmpfs rw 0 0\ndisk {tmp_path}/a/b ext4 rw 0 0\n"
    )
    for name in ("a/b", "c"):
        (tmp_path / name).mkdir(parents=True)
    found = {
        name: host_limits.in_memory(tmp_path / name, Roots(proc=tmp_path / "proc"))
        for name in ("a", "a/b", "c")
    }
    assert found == {"a": True, "a/b": False, "c": False}
    limit = host_limits.folder_limit(tmp_path)
    assert limit.shared and limit.available_bytes > 0 and str(tmp_path) in limit.name
