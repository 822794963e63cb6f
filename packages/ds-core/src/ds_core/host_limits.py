"""The limits on the memory of this process, and errors that say which of them is too low.

Every limit has a name that a user can look up, the bytes that it still permits, and what to do about it. They are read
from files of Linux and from the resource limits of the process; `Roots` names other folders for tests.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_CAP_IPC_LOCK = 1 << 14
_NO_LIMIT_V1 = 1 << 62
"""Limits of version 1 are numbers close to 2^63 if there is none."""


@dataclass(frozen=True, kw_only=True)
class Roots:
    """The folders that are read."""

    proc: Path = Path("/proc")
    cgroup: Path = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One limit on memory or disk space."""

    name: str
    available_bytes: int
    """Bytes that it still permits."""
    shared: bool
    """Whether all processes on the machine (or in the container) draw on it; otherwise it is the limit of one."""
    remedy: str
    """What raises it."""


class NotEnoughMemory(MemoryError):
    """A job needs more memory than a limit permits; nothing has been allocated."""

    limit: str
    """Name of the limit."""
    needed_bytes: int
    available_bytes: int


@dataclass(frozen=True, kw_only=True)
class Rank:
    """The rank for which memory is needed."""

    number: int = 0
    ranks_on_host: int = 1
    """Number of ranks on its machine. Each is assumed to need the same."""


def memory_limits(roots: Roots = Roots()) -> list[Limit]:
    """Returns the limits on ordinary memory: free memory, cgroups of both versions, RLIMIT_AS and RLIMIT_DATA."""
    return [*_free_memory(roots), *_cgroups(roots), *_own_limits(roots)]


def pinned_limits(roots: Roots = Roots()) -> list[Limit]:
    """Returns the limit on page-locked memory (`ulimit -l`); none for a process that may lock everything."""
    status = _status(roots)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or int(status.get("CapEff", "0"), 16) & _CAP_IPC_LOCK:
        return []
    left = max(0, soft - _kibibytes(status.get("VmLck", "0")))
    return [
        Limit(
            name="RLIMIT_MEMLOCK (ulimit -l)",
            available_bytes=left,
            shared=False,
            remedy="raise it (ulimit -l unlimited; docker run --ulimit memlock=-1; LimitMEMLOCK= of systemd)",
        )
    ]


def folder_limit(folder: Path) -> Limit:
    """Returns the free space of the file system of a folder.

    Raises:
        OSError: there is no such folder.
    """
    stats = os.statvfs(folder)
    kind = " (in memory)" if in_memory(folder) else ""
    remedy = "free space, or name a folder on another disk"
    if kind:
        remedy = "make it larger (docker run --shm-size), or name a folder on a disk"
    return Limit(
        name=f"the free space of {folder}{kind}",
        available_bytes=stats.f_bavail * stats.f_frsize,
        shared=True,
        remedy=remedy,
    )


def in_memory(folder: Path, roots: Roots = Roots()) -> bool:
    """Whether a folder is on a tmpfs, such as /dev/shm: what is written there takes memory."""
    best, kind = "", ""
    path = f"{folder.resolve()}/"
    for line in _read(roots.proc / "self/mounts").splitlines():
        parts = line.split(" ")
        if len(parts) < 3:
            continue
        mount = parts[1].encode().decode("unicode_escape").rstrip("/") + "/"
        if path.startswith(mount) and len(mount) >= len(best):
            best, kind = mount, parts[2]
    return kind in ("tmpfs", "ramfs")


def require(
    what: str,
    needed_bytes: int,
    limits: Iterable[Limit],
    *,
    rank: Rank = Rank(),
    instead: Sequence[str] = (),
) -> None:
    """Raises if a limit permits less than is needed.

    Args:
        what: what the memory is for, such as "optimizer states in host memory".
        needed_bytes: bytes that one rank needs in addition to what it has.
        limits: from the functions of this module.
        instead: what the user can do except for raising the limit.

    Raises:
        NotEnoughMemory: names needed and available bytes, the limit, the rank and remedies; of several limits, the one
            that lacks most.
    """

    def needed(limit: Limit) -> int:
        return needed_bytes * (rank.ranks_on_host if limit.shared else 1)

    broken = [limit for limit in limits if needed(limit) > limit.available_bytes]
    if not broken:
        return
    worst = max(broken, key=lambda limit: needed(limit) - limit.available_bytes)
    together = ""
    if worst.shared and rank.ranks_on_host > 1:
        together = f" ({_gib(needed(worst))} for the {rank.ranks_on_host} ranks of this machine)"
    others = [limit.name for limit in broken if limit is not worst]
    also = f"; {' and '.join(others)} would not permit it either" if others else ""
    error = NotEnoughMemory(
        f"rank {rank.number} needs {_gib(needed_bytes)}{together} for {what}, but {worst.name} permits only "
        f"{_gib(worst.available_bytes)} more{also}. {_sentence([worst.remedy, *instead])}"
    )
    error.limit, error.needed_bytes, error.available_bytes = worst.name, needed(worst), worst.available_bytes
    raise error


def _sentence(remedies: Sequence[str]) -> str:
    text = "; or ".join(remedies)
    return text[:1].upper() + text[1:]


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.3g} MiB"


# --- reading


def _free_memory(roots: Roots) -> Iterator[Limit]:
    for line in _read(roots.proc / "meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            yield Limit(
                name="MemAvailable of /proc/meminfo",
                available_bytes=_kibibytes(value),
                shared=True,
                remedy="end other processes, or use a machine with more memory",
            )


def _cgroups(roots: Roots) -> Iterator[Limit]:
    """Yields the limits of this process's cgroup and of those around it."""
    for line in _read(roots.proc / "self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
            yield from _cgroup_chain(roots.cgroup, path, names)
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _cgroup_chain(roots.cgroup / "memory", path, names)


def _cgroup_chain(root: Path, path: str, names: tuple[str, str, str]) -> Iterator[Limit]:
    """Yields the limits of a cgroup and its parents. In a container the path may be that of the host, and unknown."""
    folder = root / path.lstrip("/")
    if not folder.is_dir():
        folder = root
    limit_name, used_name, droppable_name = names
    while True:
        limit, used = _read(folder / limit_name), _read(folder / used_name)
        if limit.isdigit() and used.isdigit() and int(limit) < _NO_LIMIT_V1:
            droppable = _entry(folder / "memory.stat", droppable_name)
            yield Limit(
                name=f"{limit_name} of cgroup /{folder.relative_to(root) if folder != root else ''}",
                available_bytes=max(0, int(limit) - int(used) + droppable),
                shared=True,
                remedy="raise it (docker run --memory; resources.limits.memory of Kubernetes; MemoryMax= of systemd; "
                "--mem of Slurm)",
            )
        if folder == root or root not in folder.parents:
            return
        folder = folder.parent


def _own_limits(roots: Roots) -> Iterator[Limit]:
    status = _status(roots)
    for name, number, entry, option in (
        ("RLIMIT_AS", resource.RLIMIT_AS, "VmSize", "v"),
        ("RLIMIT_DATA", resource.RLIMIT_DATA, "VmData", "d"),
    ):
        soft, _ = resource.getrlimit(number)
        if soft != resource.RLIM_INFINITY:
            yield Limit(
                name=f"{name} (ulimit -{option})",
                available_bytes=max(0, soft - _kibibytes(status.get(entry, "0"))),
                shared=False,
                remedy=f"raise it (ulimit -{option} unlimited)",
            )


def _status(roots: Roots) -> dict[str, str]:
    entries = (line.partition(":") for line in _read(roots.proc / "self/status").splitlines())
    return {name: value.strip() for name, _, value in entries}


def _kibibytes(text: str) -> int:
    number = text.split()[0] if text.split() else "0"
    return int(number) * 1024 if number.isdigit() else 0


def _entry(file: Path, wanted: str) -> int:
    for line in _read(file).splitlines():
        name, _, value = line.partition(" ")
        if name == wanted and value.isdigit():
            return int(value)
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # another version of cgroups, or none
        return ""
