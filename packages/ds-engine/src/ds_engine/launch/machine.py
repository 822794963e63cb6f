"""Cores, memory and shared memory available to a process, from the files of Linux."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def core_numbers() -> list[int]:
    """Returns the numbers of the cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def usable_cores() -> int:
    """Returns the number of cores for this process, from its affinity and the CPU quota of its cgroup (rounded up)."""
    cores = len(os.sched_getaffinity(0))
    quota, _, period = _read(_own_cgroup() / "cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit() and int(period) > 0:
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def memory_limit_bytes() -> int | None:
    """Returns the smallest memory limit of the cgroups of this process; None if there is no limit."""
    limits = []
    folder = _own_cgroup()
    while True:
        text = _read(folder / "memory.max")
        if text.isdigit():
            limits.append(int(text))
        if folder == _CGROUP or _CGROUP not in folder.parents:
            return min(limits, default=None)
        folder = folder.parent


def memory_bytes() -> int:
    """Returns the physical memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_bytes() -> int:
    """Returns the memory that a process can still allocate, considering the kernel's caches and the limits of
    cgroups.
    """
    left = [memory_bytes()]
    for line in _read(Path("/proc/meminfo")).splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable" and value.split()[0].isdigit():
            left.append(int(value.split()[0]) * 1024)
    folder = _own_cgroup()
    while True:
        limit, used = _read(folder / "memory.max"), _read(folder / "memory.current")
        if limit.isdigit() and used.isdigit():
            left.append(max(0, int(limit) - int(used) + _droppable_bytes(folder)))
        if folder == _CGROUP or _CGROUP not in folder.parents:
            return min(left)
        folder = folder.parent


def _droppable_bytes(cgroup: Path) -> int:
    """Returns the size of file pages that count as used but can be reclaimed."""
    for line in _read(cgroup / "memory.stat").splitlines():
        name, _, count = line.partition(" ")
        if name == "inactive_file" and count.isdigit():
            return int(count)
    return 0


def oom_kills() -> int:
    """Returns how many processes of this cgroup the OOM killer has killed; 0 if unknown."""
    for line in _read(_own_cgroup() / "memory.events").splitlines():
        name, _, count = line.partition(" ")
        if name == "oom_kill" and count.isdigit():
            return int(count)
    return 0


def memory_figures(used_bytes: int) -> str:
    """Describes the memory that a process could use, and what it used: "the limit of its cgroup is 32 GiB, of which the
    rank used 31.2 GiB".
    """
    limit, total = memory_limit_bytes(), memory_bytes()
    if limit is not None and limit < total:
        return f"the limit of its cgroup is {format_bytes(limit)}, of which the rank used {format_bytes(used_bytes)}"
    return f"the machine has {format_bytes(total)}, of which the rank used {format_bytes(used_bytes)}"


def format_bytes(count: int | None) -> str:
    """Formats bytes in binary units with three significant digits: "64.0 MiB"; None is "unlimited"."""
    if count is None:
        return "unlimited"
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" or value >= 100 else f"{value:.3g} {units[0]}"


def _own_cgroup() -> Path:
    """Returns the folder of this process in the unified cgroup hierarchy; the root if the container hides the path."""
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        if line.startswith("0::"):
            folder = _CGROUP / line[3:].lstrip("/")
            return folder if folder.is_dir() else _CGROUP
    return _CGROUP


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # another version of cgroups, or none
        return ""
