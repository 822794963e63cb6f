"""The disk of one rank fails: all ranks raise, with that rank's error, while that rank still lives."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from pathlib import Path

import pytest

TRAINING = """
import errno, os, sys, torch, torch.distributed as dist, ds_zero
from ds_offload import CPUAdam, NVMeStore, PagedOptimizer
folder, fails, stage = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo")

class OneFails(NVMeStore):
    now = ""
    def check(self, what, kind):
        if f"{what} {kind}" == self.now and dist.get_rank() == 1:
            raise OSError(errno.ENOSPC, "No space left on device", "/disk of rank 1")
    def reserve(self, plan):
        for item in plan:
            self.check("reserve", item.key.kind)
        return super().reserve(plan)
    def store(self, key, src):
        self.check("store", key.kind)
        return super().store(key, src)
    def sink_grad(self, key, grad, *, offset, accumulate):
        self.check("sink", "grad")
        return super().sink_grad(key, grad, offset=offset, accumulate=accumulate)

torch.manual_seed(0)
model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)])
store = OneFails(folder)
optimizer = PagedOptimizer(CPUAdam(model.parameters(), lr=1e-2), store, page_bytes=16384)
# A rank that only waits would be found after four times these seconds.
config = ds_zero.ZeroConfig(persistence_threshold_numel=0, order_timeout_s=100.0, reduce_bucket_numel=2000,
                            param_dtype=torch.bfloat16)
try:
    store.now = fails if fails.startswith("reserve") else ""
    ds_zero.shard(model, optimizer, stage, config=config, store=store)
    for step in range(3):
        store.now = fails
        model(torch.ones(1, 64).bfloat16()).float().sum().backward()
        ds_zero.clip_grad_norm_(model, 0.3)
        optimizer.step()
        optimizer.zero_grad()
    print("trained", flush=True)
except BaseException as error:
    print(f"{type(error).__name__}: {error}", flush=True)
sys.stdin.read()
os._exit(0)
"""


@pytest.mark.parametrize(
    ("fails", "stage"),
    [("reserve master", 1), ("reserve state", 3), ("store master", 1), ("sink grad", 1), ("sink grad", 3)],
)
def test_all_ranks_raise_its_error(fails: str, stage: int, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TRAINING, str(tmp_path), fails, str(stage)],
            env={**shared, "RANK": str(rank), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = []
        for process in processes:
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], 60)
            said.append(process.stdout.readline() if ready else "nothing: it waits for the other rank")
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert "No space left on device: '/disk of rank 1'" in said[1]
    assert said[0].partition(": ")[2].startswith("rank 1 ") and "'/disk of rank 1'" in said[0], said[0]
