"""How many bytes a folder in memory can still take: its file system, the machine's memory, and the cgroup's limit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(folder: Path, root: Path = Path("/")) -> tuple[int, str]:
    """Returns the number of bytes, and what limits it.

    Args:
        root: where /proc and /sys are found.
    """
    there = os.statvfs(folder)
    limits = [(there.f_bavail * there.f_frsize, f"the file system of {folder}")]
    limits += ((free, "the memory of the machine") for free in _available(root))
    limits += ((free, "the memory limit of the cgroup") for free in _cgroups(root))
    return min(limits)


def _available(root: Path) -> Iterator[int]:
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            yield int(value.split()[0]) * 1024


def _cgroups(root: Path) -> Iterator[int]:
    """What each cgroup of this process can still allocate (version 2). Pages of a tmpfs count as used; pages of files
    that can be reclaimed do not.
    """
    top = root / _CGROUP.relative_to("/")
    own = next(
        (line[3:] for line in _read(root / "proc/self/cgroup").splitlines() if line.startswith("0::")), "/"
    )
    folder = top / own.lstrip("/")
    for group in (folder, *folder.parents):
        limit, used = _read(group / "memory.max"), _read(group / "memory.current")
        if limit.isdigit() and used.isdigit():
            fields = dict(line.split() for line in _read(group / "memory.stat").splitlines())
            yield max(0, int(limit) - int(used) + int(fields.get("inactive_file", 0)))
        if group == top:
            return


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # another version of cgroups, or another system
        return ""
