"""Pipeline schedules with stages that sleep, against their formulas and torch's executor.  `ci/bench pipe [--rounds N]`

Stages sleep instead of computing, so that several of them do not share the cores of a small machine. Forward and both
parts of backward take the same time. In each round all contenders run one step, and ten steps in a row, in turn; the
fastest round counts, because a busy machine only adds time. "simulated" is the bubble of ds_pipe.simulate for the same
number of steps, which for one step is that of the formula.
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from ds_pipe import make, simulate
from ds_pipe.executor import Executor, GroupTransport, Stage

NAMES = ("1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v")
PEER = "1f1b of torch"


class SleepBoth(torch.autograd.Function):
    """Sleeps once in forward and twice in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seconds: float) -> Tensor:
        """Sleeps."""
        ctx.seconds = seconds
        time.sleep(seconds)
        return x + weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """Sleeps."""
        time.sleep(2 * ctx.seconds)
        gradient = gradients[0].contiguous()  # that of a sum is not, and torch's executor cannot send it
        return gradient, gradient.sum().reshape(1), None


class Sleeping(nn.Module):
    """A stage with one parameter, whose forward sleeps; with `both`, its backward too."""

    def __init__(self, seconds: float, both: bool) -> None:
        super().__init__()
        self.weight, self.seconds, self.both = nn.Parameter(torch.zeros(1)), seconds, both

    def forward(self, x: Tensor) -> Tensor:
        """Sleeps."""
        if self.both:
            result: Tensor = SleepBoth.apply(x, self.weight, self.seconds)  # type: ignore[no-untyped-call]
            return result
        time.sleep(self.seconds)
        return x + self.weight


class SleepingStage(Stage):
    """A stage whose parts of backward sleep."""

    def backward(self, microbatch: int, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Sleeps twice."""
        time.sleep(2 * self.module.seconds)  # type: ignore[attr-defined]
        return super().backward(microbatch, gradients)

    def backward_input(self, microbatch: int, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Sleeps."""
        time.sleep(self.module.seconds)  # type: ignore[attr-defined]
        return super().backward_input(microbatch, gradients)

    def backward_weight(self, microbatch: int) -> None:
        """Sleeps."""
        time.sleep(self.module.seconds)  # type: ignore[attr-defined]
        super().backward_weight(microbatch)


def total(output: Tensor, target: Tensor) -> Tensor:
    """The loss."""
    return output.sum()


def ours(name: str, count: int, seconds: float) -> Callable[[], None]:
    """One step of the executor; stages of schedules with two on each rank sleep half as long."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    schedule = make(name, ranks, count)
    unit, last = seconds * ranks / schedule.num_stages, schedule.num_stages - 1
    stages = {
        s: SleepingStage(Sleeping(unit, False), s, loss_fn=total if s == last else None)
        for s in schedule.stages_of(rank)
    }
    executor = Executor(schedule, rank, stages, GroupTransport(dist.new_group()))
    data = [torch.zeros(2, 2)] * count

    def step() -> None:
        executor.step(data, data)

    return step


def peer(count: int, seconds: float) -> Callable[[], None]:
    """One step of torch's executor."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    stage = PipelineStage(Sleeping(seconds, True), rank, ranks, torch.device("cpu"), group=dist.new_group())
    schedule = Schedule1F1B(stage, count, loss_fn=total)
    data = torch.zeros(2 * count, 2)

    def step() -> None:
        if rank == 0:
            schedule.step(data)
        elif rank == ranks - 1:
            schedule.step(target=data)
        else:
            schedule.step()

    return step


def timed(step: Callable[[], None], steps: int) -> float:
    """Seconds until the last rank has run its steps."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def run(rank: int, ranks: int, args: argparse.Namespace) -> None:
    """One rank."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(args.port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    steps = {name: ours(name, args.micro_batches, args.seconds) for name in NAMES}
    steps[PEER] = peer(args.micro_batches, args.seconds)
    best: dict[tuple[str, int], float] = {}
    for name, step in steps.items():
        timed(step, 1)
        best |= {(name, 1): float("inf"), (name, 10): float("inf")}
    for _ in range(args.rounds):
        for name, number in best:
            best[name, number] = min(best[name, number], timed(steps[name], number))
    if rank == 0:
        show(best, ranks, args)
    dist.barrier()
    os._exit(0)  # the threads of the transports wait for messages that do not come


def show(best: dict[tuple[str, int], float], ranks: int, args: argparse.Namespace) -> None:
    """Prints the table."""
    print(
        f"{ranks} ranks, {args.micro_batches} micro-batches, {args.seconds} s for a forward, best of {args.rounds}"
    )
    print(
        f"{'schedule':<16}{'steps':>6}{'measured':>10}{'simulated':>11}{'step (s)':>10}{'beside torch':>14}"
    )
    for (name, number), seconds in best.items():
        work = 3 * args.micro_batches * args.seconds * number
        simulation = simulate(make("1f1b" if name == PEER else name, ranks, args.micro_batches), steps=number)
        chunks = simulation.schedule.num_stages // ranks
        expected = 1 - 3 * args.micro_batches * chunks * number / simulation.total_s
        print(
            f"{name:<16}{number:>6}{1 - work / seconds:>10.1%}{expected:>11.1%}{seconds / number:>10.3f}"
            f"{best[PEER, number] / seconds:>13.2f}x",
            flush=True,
        )


def main() -> None:
    """Starts the ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.08, help="time of a forward")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        args.port = listening.getsockname()[1]
    mp.spawn(run, args=(args.ranks, args), nprocs=args.ranks)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
