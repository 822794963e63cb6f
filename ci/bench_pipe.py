"""ds-pipe with stages that sleep: `ci/bench pipe [bubbles|simulator] [--rounds N]`.

Stages sleep instead of computing, so that several of them do not share the cores of a small machine. In each round all
contenders run in turn; the fastest round counts, because a busy machine only adds time.

bubbles     every schedule, one step alone and several in a row, beside `torch.distributed.pipelining`. Forward and both
            parts of backward take the same time. "measured" is the share of time in which a rank does not compute: what
            stages need alone is measured first. "formula" is the bubble of ds_pipe.simulate for the same number of
            steps without costs of messages and actions, which for one step is that of the papers.
simulator   times of stages, actions and messages are measured first; then the simulator's time of a step and its peak
            of kept activations stand beside those of the executor, for 20 configurations.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from ds_pipe import Costs, StageCosts, choose, make, simulate
from ds_pipe.actions import Action, Op
from ds_pipe.executor import Executor, GroupTransport, MemoryHub
from ds_pipe.schedule.names import placement
from workloads.sleeping_stages import (
    SavedBytes,
    SlowTransport,
    Times,
    median_s,
    on_ranks,
    stages_of,
    timed,
    total,
)

NAMES = ("1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v")
PEER = "1f1b of torch"
SMALL, ROWS = (2, 2), (64, 1024)
"""Shapes of the messages of both parts: 16 bytes, 256 KiB."""
FAST, SLOW = (0.0, float("inf")), (0.005, 20e6)
"""Latency in seconds, bytes per second."""


# --- bubbles


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


class SleepingBoth(nn.Module):
    """A stage for torch's executor."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight, self.seconds = nn.Parameter(torch.zeros(1)), seconds

    def forward(self, x: Tensor) -> Tensor:
        """Sleeps."""
        result: Tensor = SleepBoth.apply(x, self.weight, self.seconds)  # type: ignore[no-untyped-call]
        return result


def ours(name: str, count: int, seconds: float) -> tuple[Callable[[], object], float]:
    """One step of the executor, and the seconds in which each rank computes; stages of schedules with two on each rank
    sleep half as long.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    schedule = make(name, ranks, count)
    unit = seconds * ranks / schedule.num_stages
    stages = stages_of(rank, schedule.rank_of_stage, [Times(unit, unit, unit)] * schedule.num_stages)
    executor = Executor(schedule, rank, stages, GroupTransport(dist.new_group()))
    data = [torch.zeros(SMALL)] * count
    work_s = count * sum(median_s(lambda s=s: alone(s, name.startswith("zb")), 3) for s in stages.values())
    return lambda: executor.step(data, data), work_s


def alone(stage: Any, split: bool) -> None:
    """Forward and backward of one micro-batch, without an executor: sleeping, and what autograd needs."""
    x = torch.zeros(SMALL)
    if stage.loss_fn is None:
        stage.forward(0, x)
    else:
        stage.last_forward(0, x, x, lambda loss: loss)
    gradients = [None if stage.loss_fn is not None else x]
    if split:
        stage.backward_input(0, gradients)
        stage.backward_weight(0)
    else:
        stage.backward(0, gradients)


def peer(count: int, seconds: float) -> Callable[[], object]:
    """One step of torch's executor."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    stage = PipelineStage(SleepingBoth(seconds), rank, ranks, torch.device("cpu"), group=dist.new_group())
    schedule = Schedule1F1B(stage, count, loss_fn=total)
    data = torch.zeros(2 * count, 2)
    if rank == 0:
        return lambda: schedule.step(data)
    return (lambda: schedule.step(target=data)) if rank == ranks - 1 else schedule.step


def bubbles(rank: int, ranks: int, args: argparse.Namespace) -> None:
    """One rank of the first part."""
    steps: dict[str, Callable[[], object]] = {}
    work_s: dict[str, float] = {}
    for name in args.names:
        if name == PEER:  # its stages compute what those of our 1F1B do
            steps[name] = peer(args.micro_batches, args.seconds)
        else:
            steps[name], work_s[name] = ours(name, args.micro_batches, args.seconds)
    work_s[PEER] = work_s.get("1f1b", 3 * args.micro_batches * args.seconds)
    for step in steps.values():
        timed(step, 1)
    best = dict.fromkeys(itertools.product(steps, args.steps), float("inf"))
    for _ in range(args.rounds):
        for name, number in best:
            best[name, number] = min(best[name, number], timed(steps[name], number))
    costs = costs_of_bubbles(rank, ranks, args.seconds)
    if rank == 0:
        show_bubbles(best, work_s, ranks, args)
        names = [name for name in args.names if name != PEER]
        for number in args.steps:
            found = choose(costs, ranks, args.micro_batches, names=names, steps=number).candidates
            predicted = ", ".join(f"{one.name} {one.simulation.step_s:.3f} s" for one in found)
            print(f"chosen for {number} in a row, with measured costs: {predicted}", flush=True)


def costs_of_bubbles(rank: int, ranks: int, seconds: float) -> Costs:
    """What `choose` is given: measured costs of the finest division."""
    rank_of_stage = placement("zb-v", ranks)
    unit = seconds / 2
    stages = calibrated(rank_of_stage, [Times(unit, unit, unit)] * len(rank_of_stage), SMALL)
    own_s = action_seconds(SMALL) if rank == 0 else 0.0
    action_s, message_s = broadcast(own_s, message_seconds(FAST, SMALL))
    return Costs(stages=tuple(stages), latency_s=message_s, action_s=action_s)


def show_bubbles(
    best: dict[tuple[str, int], float], work_s: dict[str, float], ranks: int, args: argparse.Namespace
) -> None:
    """Prints the table."""
    count = args.micro_batches
    print(f"{ranks} ranks, {count} micro-batches, {args.seconds} s for a forward, best of {args.rounds}")
    print("| schedule | steps in a row | measured bubble | formula | step (s) | throughput beside 1F1B |")
    print("|---|---|---|---|---|---|")
    for (name, number), seconds in best.items():
        simulation = simulate(make("1f1b" if name == PEER else name, ranks, count), steps=number)
        units = 3 * count * simulation.schedule.num_stages // ranks * number
        beside = best.get(("1f1b", number), float("nan")) / seconds
        print(
            f"| {name} | {number} | {1 - work_s[name] * number / seconds:.1%} | {1 - units / simulation.total_s:.1%} "
            f"| {seconds / number:.3f} | {beside:.2f}x |",
            flush=True,
        )


# --- simulator

CONFIGURATIONS = [
    (name, count, uneven, slow)
    for name in ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v")
    for count, uneven, slow in ((4, False, False), (8, True, False), (8, False, True), (16, True, True))
]


def times_of(num_stages: int, ranks: int, seconds: float, uneven: bool) -> list[Times]:
    """Times and kept bytes of all stages; uneven ones differ by up to a half, each in its own way."""
    unit = seconds * ranks / num_stages
    if not uneven:
        return [Times(unit, unit, unit, 1 << 20)] * num_stages
    return [
        Times(unit * (1 + 0.5 * (s % 2)), unit * (1.2 - 0.1 * (s % 3)), unit * 0.8, (1 + s % 3) << 20)
        for s in range(num_stages)
    ]


def calibrated(
    rank_of_stage: tuple[int, ...], times: list[Times], shape: tuple[int, int] = ROWS
) -> list[StageCosts]:
    """Measured costs of all stages: each rank runs forwards and backwards of its own, without an executor."""
    own: dict[int, StageCosts] = {}
    num_stages = len(rank_of_stage)
    counter = SavedBytes()
    for s, stage in stages_of(dist.get_rank(), rank_of_stage, times, counter).items():
        x = torch.zeros(shape, requires_grad=s > 0)
        last = s == num_stages - 1

        def forward(stage: Any = stage, x: Tensor = x, last: bool = last) -> None:
            if last:
                stage.last_forward(0, x, x, lambda loss: loss)
            else:
                stage.forward(0, x)

        gradients = [None] if last else [torch.zeros(shape)]
        seconds: dict[str, list[float]] = {"forward_s": [], "backward_input_s": [], "backward_weight_s": []}
        for _ in range(3):
            before = counter.now
            seconds["forward_s"].append(median_s(forward, 1))
            kept = counter.now - before
            seconds["backward_input_s"].append(
                median_s(lambda st=stage, g=gradients: st.backward_input(0, g), 1)
            )
            seconds["backward_weight_s"].append(median_s(lambda st=stage: st.backward_weight(0), 1))
        own[s] = StageCosts(
            activation_bytes=kept,
            output_bytes=shape[0] * shape[1] * 4,
            **{k: sorted(v)[1] for k, v in seconds.items()},
        )
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    merged = {s: costs for part in every for s, costs in part.items()}
    return [merged[s] for s in range(num_stages)]


def action_seconds(shape: tuple[int, int] = ROWS) -> float:
    """Seconds that the executor needs for an action beside the stage's own."""
    schedule = make("1f1b", 1, 50)
    executor = Executor(schedule, 0, stages_of(0, (0,), [Times(0, 0, 0)]), MemoryHub(1).transport(0))
    data = [torch.zeros(shape)] * 50
    stage = stages_of(0, (0,), [Times(0, 0, 0)])[0]

    def alone() -> None:
        for m in range(50):
            stage.last_forward(m, data[m], data[m], lambda loss: loss)
            stage.backward(m, [None])

    return max(0.0, median_s(lambda: executor.step(data, data)) - median_s(alone)) / 100


def message_seconds(link: tuple[float, float], shape: tuple[int, int] = ROWS) -> float:
    """Seconds of a message from one rank to the next over a link, half of those there and back."""
    rank, transport, seconds = dist.get_rank(), SlowTransport(dist.new_group(), *link), []
    value = torch.zeros(shape)
    for m in range(15):
        there, back = Action(1, Op.RECV_FORWARD, m), Action(0, Op.RECV_BACKWARD, m)
        dist.barrier()
        start = time.perf_counter()
        if rank == 0:
            transport.expect(1, back)
            transport.send(1, there, value)
            transport.receive(1, back)
        elif rank == 1:
            transport.expect(0, there)
            transport.receive(0, there)
            transport.send(0, back, value)
        seconds.append((time.perf_counter() - start) / 2)
    transport.close()
    return sorted(seconds)[7]


def broadcast(*values: float) -> list[float]:
    """The values of rank 0, on all ranks."""
    box = torch.tensor(values, dtype=torch.float64)
    dist.broadcast(box, 0)
    return box.tolist()


def simulator(rank: int, ranks: int, args: argparse.Namespace) -> None:
    """One rank of the second part."""
    own_s = action_seconds() if rank == 0 else 0.0  # on one rank: several would share cores
    action_s, fast_s, slow_s = broadcast(own_s, message_seconds(FAST), message_seconds(SLOW))
    message_bytes = ROWS[0] * ROWS[1] * 4
    if rank == 0:
        print(
            f"{ranks} ranks, {args.seconds} s for a forward, best of {args.rounds}; measured: {action_s * 1e6:.0f} us "
            f"for an action, {fast_s * 1e3:.2f} ms for a message of {message_bytes >> 10} KiB, over slow links "
            f"{slow_s * 1e3:.2f} ms"
        )
        print("| schedule | micro-batches | stages | links | simulated (s) | measured (s) | difference "
              "| activations simulated (MiB) | measured | difference |")  # fmt: skip
        print("|---|---|---|---|---|---|---|---|---|---|")
    worst = [0.0, 0.0]
    for name, count, uneven, slow in CONFIGURATIONS:
        rank_of_stage = placement(name, ranks)
        times = times_of(len(rank_of_stage), ranks, args.seconds, uneven)
        stage_costs = calibrated(rank_of_stage, times)
        latency_s, bytes_per_s = SLOW if slow else FAST
        arrival_s = slow_s - message_bytes / bytes_per_s if slow else fast_s
        costs = Costs(
            stages=tuple(stage_costs), latency_s=arrival_s, bytes_per_s=bytes_per_s, action_s=action_s
        )
        fitted = [(c.forward_s, c.backward_input_s, c.backward_weight_s) for c in stage_costs]
        schedule = make(name, ranks, count, times=fitted if name.startswith("zb-") else None)
        counter = SavedBytes()
        stages = stages_of(rank, rank_of_stage, times, counter)
        transport = SlowTransport(dist.new_group(), latency_s, bytes_per_s)
        executor = Executor(schedule, rank, stages, transport)
        data = [torch.zeros(ROWS)] * count
        simulation = simulate(executor.schedule, costs)
        timed(lambda e=executor, d=data: e.step(d, d), 1)
        seconds = min(timed(lambda e=executor, d=data: e.step(d, d), 1) for _ in range(args.rounds))
        peaks: list[int] = [0] * ranks
        dist.all_gather_object(peaks, counter.peak)
        executor.close()
        if rank:
            continue
        at = max(range(ranks), key=lambda r, s=simulation: s.peak_activation_bytes[r])
        predicted = simulation.peak_activation_bytes[at]
        off_s, off_bytes = (
            simulation.total_s / seconds - 1,
            max(
                (abs(p / q - 1) for p, q in zip(simulation.peak_activation_bytes, peaks, strict=True)),
                default=0.0,
            ),
        )
        worst = [max(worst[0], abs(off_s)), max(worst[1], off_bytes)]
        print(
            f"| {name} | {count} | {'uneven' if uneven else 'equal'} | {'slow' if slow else 'fast'} "
            f"| {simulation.total_s:.3f} | {seconds:.3f} | {off_s:+.1%} | {predicted / 2**20:.1f} "
            f"| {peaks[at] / 2**20:.1f} | {off_bytes:.1%} |",
            flush=True,
        )
    if rank == 0:
        print(f"largest differences: step {worst[0]:.1%}, activations {worst[1]:.1%}", flush=True)


def main() -> None:
    """Starts the ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=("bubbles", "simulator"), default="bubbles")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.04, help="time of a forward")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 10], help="steps in a row")
    parser.add_argument("--names", nargs="+", default=[*NAMES, PEER], help="schedules")
    args = parser.parse_args()
    on_ranks(args.ranks, {"bubbles": bubbles, "simulator": simulator}[args.part], args)


if __name__ == "__main__":
    main()
