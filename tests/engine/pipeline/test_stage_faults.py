"""A stage that raises, dies or sends another shape in one of two copies of a pipeline: all ranks say where."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, signal, time
import torch
import torch.distributed as dist
from torch import nn
import ds_engine
from ds_pipe import PipelineError
from ds_pipe.model import LayerSpec, PipelineModule

class Faulty(nn.Linear):
    # Its third forward, which is that of micro-batch 2, fails on one rank.
    def __init__(self, fault, on_rank):
        super().__init__(4, 4)
        self.fault, self.calls = fault if dist.get_rank() == on_rank else "", 0

    def forward(self, x):
        self.calls += 1
        fault = self.fault if self.calls == 3 else ""
        if fault == "raises":
            raise KeyError("a fault of the model")
        if fault == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)[:, : 3 if fault == "shape" else 4]

torch.set_num_threads(1)
dist.init_process_group("gloo")
# Ranks 0 and 1 have the first stage, 2 and 3 the second.
for fault, on_rank in (("raises", 2), ("shape", 1), ("dies", 3)):
    module = PipelineModule([LayerSpec(Faulty, fault, on_rank) for _ in range(2)], 2, loss_fn=nn.functional.mse_loss)
    engine, *_ = ds_engine.initialize(module, {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4, "zero_optimization": {"stage": 2},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "startup_summary": False,
    })
    start = time.monotonic()
    try:
        engine.train_batch((torch.randn(2, 4), torch.randn(2, 4)) for _ in range(4))
    except PipelineError as error:
        print(f"{fault} {time.monotonic() - start:.1f} s: {error}".replace("\\n", " "), flush=True)
    engine.pipeline.close()
"""


def test_every_rank_names_the_stage_the_micro_batch_and_the_action_within_10_s(tmp_path: Path):
    script = tmp_path / "faults.py"
    script.write_text(SCRIPT)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = str(listening.getsockname()[1])
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "4"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    try:
        results = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    causes = {
        "raises": "rank 2 failed at stage 1, micro-batch 2, forward (1F2): KeyError: 'a fault of the model'",
        "shape": "rank 3 failed at stage 1, micro-batch 2, forward (1F2): RuntimeError: ",
        "dies": r"rank \d (stopped|failed) at stage \d, micro-batch \d, \w+",
    }
    for rank, (out, err) in enumerate(results):
        lines = dict(line.split(" ", 1) for line in out.splitlines())
        died = ["raises", "shape"] if rank == 3 else [*causes]
        assert list(lines) == died, (rank, out, err)
        for fault, line in lines.items():
            seconds, message = line.split(" s: ", 1)
            assert float(seconds) < 10, (rank, fault, line)
            cause = causes[fault] if fault == "dies" else re.escape(causes[fault])
            assert re.search(cause, message), (rank, fault, message)
        assert processes[rank].returncode == (-9 if rank == 3 else 0), (rank, err)
