"""The executor on a process group: the bits of one process, and faults that every rank learns."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ds_pipe import PipelineError, make
from ds_pipe.executor import Executor, GroupTransport, Stage
from harness import ranks
from pipe.executor.models import batches, own_stages, stages, trained_alone


def trained(name, num_microbatches, steps, **options):
    schedule = make(name, dist.get_world_size(), num_microbatches)
    parts = stages(schedule.num_stages)
    rank = dist.get_rank()
    own = own_stages(schedule, rank, parts)
    executor = Executor(schedule, rank, own, GroupTransport(**options))
    params = [p for stage in own.values() for p in stage.parameters()]
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    losses = []
    for step in range(steps):
        result = executor.step(*batches(num_microbatches, step))
        losses.append([loss.item() for loss in result.losses])
        optimizer.step()
        optimizer.zero_grad()
    executor.finish()
    executor.close()
    return losses, own, schedule


@ranks(2, 4)
@pytest.mark.parametrize(
    "name",
    [
        "1f1b",
        "zb-v",
        "interleaved",
        pytest.param("gpipe", marks=pytest.mark.full),
        pytest.param("zb-h2", marks=pytest.mark.full),
        pytest.param("dualpipev", marks=pytest.mark.full),
    ],
)
def test_losses_and_weights_are_those_of_one_process(name, world_size):
    losses, own, schedule = trained(name, 8, 10)
    alone = stages(schedule.num_stages)
    expected = trained_alone(alone, 10, 8)
    if dist.get_rank() == schedule.rank_of_stage[-1]:
        assert losses == expected
    for index, stage in own.items():
        for a, b in zip(stage.parameters(), alone[index].parameters(), strict=True):
            assert torch.equal(a, b)


class Pooled(nn.Module):
    """Works on any length."""

    def __init__(self, index):
        super().__init__()
        self.index, self.inner = index, nn.Linear(4, 4)

    def forward(self, value):
        x, lengths = value
        x = torch.tanh(self.inner(x))
        return (x, lengths) if self.index < 3 else x.mean() * lengths[0]


@ranks(4)
def test_random_lengths_for_50_steps():
    rank, schedule = dist.get_rank(), make("1f1b", 4, 4)
    torch.manual_seed(0)
    parts = [Pooled(i) for i in range(4)]
    executor = Executor(schedule, rank, {rank: Stage(parts[rank], rank)}, GroupTransport())
    generator = torch.Generator().manual_seed(7)
    for step in range(50):
        # Of few lengths some follow each other, so that the next is expected, and some are expected in vain.
        lengths = torch.randint(0, 30 if step % 2 else 3, (4,), generator=generator).tolist()
        inputs = [(torch.randn(1 + n, 4, generator=generator), [n, "tokens"]) for n in lengths]
        losses = executor.step(inputs).losses
        if rank == 3:
            with torch.no_grad():
                for value, loss in zip(inputs, losses, strict=True):
                    for part in parts:
                        value = part(value)
                    assert torch.equal(value, loss)
        for p in parts[rank].parameters():
            p.grad = None
    executor.finish()
    executor.close()


class Faulty(nn.Module):
    def __init__(self, fault):
        super().__init__()
        self.inner, self.fault, self.calls = nn.Linear(4, 4), fault, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 3 and self.fault == "raises":
            raise KeyError("a fault of the model")
        y = self.inner(x)
        if self.calls == 3 and self.fault == "shape":
            y = y[:, :3]
        return y


def faulty_step(fault, faulty_rank):
    """One step in a group of its own, which cannot be used after a failure."""
    rank, schedule = dist.get_rank(), make("1f1b", dist.get_world_size(), 6)
    last = schedule.num_stages - 1
    stage = Stage(
        Faulty(fault if rank == faulty_rank else ""),
        rank,
        loss_fn=(lambda y, t: nn.functional.mse_loss(y, t)) if rank == last else None,
    )
    group = dist.new_group()
    executor = Executor(schedule, rank, {rank: stage}, GroupTransport(group, timeout_s=30))
    try:
        executor.step([torch.randn(2, 4) for _ in range(6)], [torch.randn(2, 4) for _ in range(6)])
        executor.finish()
    finally:
        executor.close()
        dist.destroy_process_group(group)


@ranks(4)
@pytest.mark.parametrize("faulty_rank", [0, *(pytest.param(r, marks=pytest.mark.full) for r in (1, 2, 3))])
def test_when_a_stage_raises_every_rank_says_where(faulty_rank):
    start = time.monotonic()
    with pytest.raises(PipelineError) as error:
        faulty_step("raises", faulty_rank)
    seconds = time.monotonic() - start
    place = f"rank {faulty_rank} failed at stage {faulty_rank}, micro-batch 2, forward ({faulty_rank}F2): KeyError"
    assert place in str(error.value), str(error.value)
    assert seconds < 10


@ranks(4)
def test_a_changed_shape_is_an_error_of_the_stage_that_receives_it():
    with pytest.raises(
        PipelineError, match=re.escape("failed at stage 2, micro-batch 2, forward (2F2): RuntimeError")
    ):
        faulty_step("shape", 1)


DYING = """
import os, signal, sys, time
import torch, torch.distributed as dist
from ds_pipe import PipelineError, make
from ds_pipe.executor import Executor, GroupTransport, Stage

dist.init_process_group("gloo")
rank = dist.get_rank()

class Dying(torch.nn.Linear):
    calls = 0
    def forward(self, x):
        Dying.calls += 1
        if Dying.calls == 3 and rank == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)

loss_fn = torch.nn.functional.mse_loss if rank == 2 else None
executor = Executor(make("1f1b", 3, 6), rank, {rank: Stage(Dying(4, 4), rank, loss_fn=loss_fn)}, GroupTransport())
dist.barrier()  # a rank that starts late would still connect to the store of one that is dead
start = time.monotonic()
try:
    executor.step([torch.randn(2, 4)] * 6, [torch.randn(2, 4)] * 6)
except PipelineError as error:
    print(f"{time.monotonic() - start:.1f} s: {error}")
"""


@pytest.mark.parametrize(
    "dies", [1, pytest.param(0, marks=pytest.mark.full), pytest.param(2, marks=pytest.mark.full)]
)
def test_when_a_process_is_killed_every_other_rank_says_where_it_waited(dies, tmp_path: Path):
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"}
    environment["MASTER_PORT"] = str(_free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(dies)],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    results = [process.communicate(timeout=120) for process in processes]
    for rank, (out, err) in enumerate(results):
        if rank == dies:
            assert processes[rank].returncode == -9
            continue
        seconds, message = out.split(" s: ", 1)
        assert float(seconds) < 10, out
        assert re.search(rf"rank {rank} stopped at stage {rank}, micro-batch \d, ", message), (out, err)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
