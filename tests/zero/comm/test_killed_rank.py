"""A rank is killed, without a launcher: every other rank names it, and no other one."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys

import pytest

TRAINING = """
import os, torch, torch.distributed as dist, ds_comm, ds_zero
dist.init_process_group("gloo")
model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)])
optimizer = torch.optim.AdamW(model.parameters())
config = ds_zero.ZeroConfig(order_timeout_s=4)
comm = ds_comm.collectives() if os.environ["READS"] == "1" else None
ds_zero.shard(model, optimizer, stage=3, config=config, comm=comm)
try:
    for step in range(1_000_000):
        if step == 3:
            print("trains", flush=True)
        model(torch.ones(1, 64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
except BaseException as error:
    print(f"{type(error).__name__}: {error}", flush=True)
os._exit(0)
"""


def start(size: int, reads: bool) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ,
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "READS": str(int(reads)),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", TRAINING],
            env={**shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


@pytest.mark.parametrize(
    ("killed", "reads", "named"),
    [
        (1, True, "; rank 1 do not answer"),
        (0, False, "held by rank 0"),
        pytest.param(2, False, "; rank 2 do not answer", marks=pytest.mark.full),
    ],
)
def test_the_survivors_name_the_killed_rank_and_no_other(killed: int, reads: bool, named: str) -> None:
    processes = start(3, reads)
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "trains\n"
        processes[killed].kill()
        said = [p.communicate(timeout=100)[0] for rank, p in enumerate(processes) if rank != killed]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    for text in said:
        assert text.startswith("RankOrderError: "), text
        assert named in text, text
        lines = re.findall(r"^  rank (\d)", text, re.MULTILINE)
        assert str(killed) not in lines, text
