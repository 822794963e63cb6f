"""The part "memory" of `ci/bench checkpoint`: what copies in the memory of hosts cost, and how fast they are loaded.

Two ranks on this machine play a host each. What they send goes over the loopback interface.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import time
import warnings
from pathlib import Path
from typing import Any


def as_host(root: Path) -> Path:
    """Makes this rank a host of its own, and returns its folder in memory."""
    import torch.distributed as dist

    host = f"host-{dist.get_rank()}"
    base = Path("/dev/shm") / root.parent.name / host
    base.mkdir(parents=True, exist_ok=True)
    socket.gethostname = lambda: host
    os.environ |= {"DS_MEMORY_FOLDER": str(base), "DS_JOB": "bench"}
    return base


def memory(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Seconds of steps, of copies in memory, and of loads from there and from the disk."""
    import torch.distributed as dist

    import bench_checkpoint as job

    warnings.simplefilter("ignore")
    base = as_host(root)
    engine = job.build(args, checkpoint={"memory_copies": {}})
    found: dict[str, list[float]] = {}

    def load_what_the_other_host_kept() -> None:
        assert "/dev/shm" in engine.resume(root)[0]

    for number in range(args.rounds + 1):
        times = {
            "ordinary": statistics.median(
                job.timed(lambda: job.step(engine, args)) for _ in range(job.ORDINARY)
            )
        }
        times["copy"] = job.timed(engine.save_copy)
        times["save"] = job.timed(lambda: engine.save_checkpoint(root, "tag"))
        if dist.get_rank() == 0:
            job.forget_pages(root)
        times["load, disk"] = job.timed(lambda: engine.load_checkpoint(root))
        shutil.rmtree(root, ignore_errors=True)
        times["load, own memory"] = job.timed(lambda: engine.resume(root))
        if dist.get_rank() == 1:
            for generation in base.glob("*/copy*"):
                shutil.rmtree(generation)
        times["load, half of it from the other host"] = job.timed(load_what_the_other_host_kept)
        for name, seconds in times.items() if number > 0 else ():
            found.setdefault(name, []).append(seconds)
    engine.save_copy()
    engine.save_checkpoint(root, "tag")
    size = sum(file.stat().st_size for file in base.rglob("rank-*"))
    engine.destroy()
    return {"mb": size / job.MB, "seconds": found}


def restart(args: argparse.Namespace, root: Path, *, copies: bool) -> dict[str, Any]:
    """Seconds from the start of the processes until the state is loaded, and those of the load."""
    import torch.distributed as dist

    import bench_checkpoint as job

    warnings.simplefilter("ignore")
    base = as_host(root)
    if copies and dist.get_rank() == 1:
        shutil.rmtree(base)  # this host is lost; a spare takes its place
        base.mkdir()
    if not copies and dist.get_rank() == 0:
        job.forget_pages(root)
    engine = job.build(args, checkpoint={"memory_copies": {}} if copies else {}, trained=False)
    seconds = job.timed(lambda: engine.resume(root / "none" if copies else root))
    assert engine.global_steps > 0
    total = time.time() - float(os.environ["DS_BENCH_START"])
    if copies:
        engine.save_copy()  # for the next restart
    engine.destroy()
    return {"load": seconds, "total": total}
