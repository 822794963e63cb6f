"""What the operating system counts: resident memory stays near the plan.

glibc raises the size from which a block goes back when it is freed, and then its heap gets holes: the
job of stage 3 below peaked at 432 MB instead of 277. Here that size is fixed, so that what is held is measured.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

JOBS = {"stage 1": {"stage": 1}, "stage 3": {"stage": 3}}
"""In fp32: what oneDNN keeps for 16-bit products on a CPU is in no plan."""
SLACK_BYTES = 64 << 20


def resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def one_rank(name: str) -> None:
    """Train, and print the highest resident memory above what the process held before there was a model."""
    import ds_comm
    from zero.planned import Job

    job = JOBS[name]
    large = Job(**job, model={"dim": 512, "layers": 6})
    world = ds_comm.start()
    # What a first training loads into any process: libraries, connections, threads.
    Job(**job, model={"dim": 32, "layers": 1}).count()
    ctypes.CDLL(None).malloc_trim(0)
    bare = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest value counts from now on
    large.count(steps=3)
    above = resident_bytes("VmHWM") - bare
    if world.rank == 0:
        plan = large.plan(dist.get_world_size())
        print(json.dumps({"above": above, "device": plan.device_bytes, "host": plan.host_bytes}), flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends right after a collective


@pytest.mark.parametrize("name", [pytest.param("stage 1", marks=pytest.mark.full), "stage 3"])
def test_resident_memory_is_near_the_plan(name: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    tests = str(Path(__file__).resolve().parents[1])
    shared = dict(
        os.environ, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    given_back = str(1 << 17)
    shared |= {"MALLOC_MMAP_THRESHOLD_": given_back, "MALLOC_TRIM_THRESHOLD_": given_back}
    shared |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, name],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [p.communicate(timeout=240) for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert all(p.returncode == 0 for p in processes), outputs
    found = next(json.loads(line) for line in outputs[0][0].splitlines() if line.startswith('{"above"'))
    planned = found["device"] + found["host"]
    assert found["above"] <= 1.15 * planned + SLACK_BYTES, found
    assert found["above"] >= 0.85 * planned - SLACK_BYTES, found


if __name__ == "__main__":
    one_rank(sys.argv[1])
