"""fio at its best, for benchmarks of disks: O_DIRECT, many requests at once, buffers on huge pages.

With buffers of 4 KiB pages the device is given as many pieces as there are pages, and is slower.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")
BLOCK_BYTES, QUEUE_DEPTH = 1 << 20, 32


@dataclass(frozen=True)
class Job:
    """One file that is read or written from its start."""

    path: Path
    direction: str
    """"read" or "write"."""
    num_bytes: int


@contextmanager
def huge_pages(count: int = 64) -> Iterator[bool]:
    """Reserves huge pages for fio's buffers; false where this process may not."""
    before = HUGE_PAGES.read_text()
    try:
        HUGE_PAGES.write_text(str(count))
    except OSError:
        yield False
        return
    try:
        yield int(HUGE_PAGES.read_text()) >= count
    finally:
        HUGE_PAGES.write_text(before)


def seconds(jobs: list[Job], engine: str, memory: str) -> float:
    """How long all jobs take, which run at once: that of the slowest. `memory` is fio's `--iomem`."""
    command = ["fio", f"--bs={BLOCK_BYTES}", f"--iodepth={QUEUE_DEPTH}", f"--ioengine={engine}", "--direct=1",
               f"--iomem={memory}", "--overwrite=1", "--output-format=json"]  # fmt: skip
    for index, job in enumerate(jobs):
        command += [
            f"--name=job{index}",
            f"--filename={job.path}",
            f"--rw={job.direction}",
            f"--size={job.num_bytes}",
        ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"fio: {done.stderr or done.stdout}")
    report = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    return max(
        job.num_bytes / float(told[job.direction]["bw_bytes"]) for job, told in zip(jobs, report, strict=True)
    )


def machine(folder: Path) -> str:
    """The processor, and the file system and disk of a folder."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((x.split(":")[1].strip() for x in lines if "model name" in x), "?")
    found = subprocess.run(
        ["findmnt", "-n", "-o", "FSTYPE,SOURCE", "-T", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    return (f"{cpu}, {os.cpu_count()} cores, Linux {platform.release()}, {' on '.join(found.stdout.split())}, "
            f"load {os.getloadavg()[0]:.1f}")  # fmt: skip
