"""Stages that sleep instead of computing, so that ranks do not share the cores of a small machine; slow links.

For the benchmarks of ds-pipe.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from ds_pipe.actions import Action
from ds_pipe.executor import GroupTransport, Stage, StageOptions


@dataclass(frozen=True)
class Times:
    """Seconds of one stage, and what it keeps."""

    forward_s: float
    input_s: float
    weight_s: float
    kept_bytes: int = 0


class Keep(torch.autograd.Function):
    """Adds a weight, and keeps bytes for backward as a layer keeps its activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kept_bytes: int) -> Tensor:
        """Returns x + weight."""
        ctx.save_for_backward(torch.empty(kept_bytes, dtype=torch.uint8))
        return x + weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """The gradients of x and of the weight."""
        assert ctx.saved_tensors
        return gradients[0], gradients[0].sum().reshape(1), None


class Sleeping(nn.Module):
    """A stage with one parameter, whose forward sleeps."""

    def __init__(self, times: Times) -> None:
        super().__init__()
        self.weight, self.times = nn.Parameter(torch.zeros(1)), times

    def forward(self, x: Tensor) -> Tensor:
        """Sleeps."""
        time.sleep(self.times.forward_s)
        result: Tensor = Keep.apply(x, self.weight, self.times.kept_bytes)  # type: ignore[no-untyped-call]
        return result


class SleepingStage(Stage):
    """A stage whose parts of backward sleep."""

    module: Sleeping

    def backward(self, microbatch: int, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Sleeps for both parts."""
        time.sleep(self.module.times.input_s + self.module.times.weight_s)
        return super().backward(microbatch, gradients)

    def backward_input(self, microbatch: int, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Sleeps."""
        time.sleep(self.module.times.input_s)
        return super().backward_input(microbatch, gradients)

    def backward_weight(self, microbatch: int) -> None:
        """Sleeps."""
        time.sleep(self.module.times.weight_s)
        super().backward_weight(microbatch)


class SavedBytes:
    """Counts the bytes that autograd keeps for backward at the same time."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def around(self) -> Any:
        """A context for forwards, as `StageOptions.around` takes it."""
        return torch.autograd.graph.saved_tensors_hooks(lambda t: _Kept(self, t), lambda kept: kept.tensor)


class _Kept:
    def __init__(self, counter: SavedBytes, tensor: Tensor) -> None:
        self.counter, self.tensor, self.bytes = counter, tensor, tensor.nbytes
        counter.now += self.bytes
        counter.peak = max(counter.peak, counter.now)

    def __del__(self) -> None:
        self.counter.now -= self.bytes


def total(output: Tensor, target: Tensor) -> Tensor:
    """The loss."""
    return output.sum()


def stages_of(
    rank: int, rank_of_stage: Sequence[int], times: Sequence[Times], counter: SavedBytes | None = None
) -> dict[int, Stage]:
    """The stages of a rank."""
    options = StageOptions() if counter is None else StageOptions(around=counter.around)
    last = len(rank_of_stage) - 1
    return {
        s: SleepingStage(Sleeping(times[s]), s, loss_fn=total if s == last else None, options=options)
        for s, r in enumerate(rank_of_stage)
        if r == rank
    }


class SlowTransport(GroupTransport):
    """Messages arrive as late as over a link with this latency and bandwidth, in each direction of two ranks.

    A message is transferred once it is sent, its receive has started and the message before it has been transferred.
    """

    def __init__(self, group: dist.ProcessGroup, latency_s: float, bytes_per_s: float) -> None:
        super().__init__(group)
        self._latency_s, self._bytes_per_s = latency_s, bytes_per_s
        self._posted: dict[int, dict[Action, float]] = defaultdict(dict)
        self._free: dict[int, float] = defaultdict(float)
        self._values: dict[tuple[int, Action], tuple[float, Any]] = {}

    def send(self, rank: int, label: Action, value: Any) -> None:
        """Sends with the time."""
        super().send(rank, label, (torch.tensor([time.monotonic()], dtype=torch.float64), value))

    def expect(self, rank: int, label: Action) -> None:
        """Notes the time."""
        self._posted[rank][label] = time.monotonic()
        super().expect(rank, label)

    def receive(self, rank: int, label: Action) -> Any:
        """Waits until the message would have arrived."""
        while (rank, label) not in self._values:
            earliest = next(iter(self._posted[rank]))  # in the order of the link
            posted = self._posted[rank].pop(earliest)
            sent, value = super().receive(rank, earliest)
            begin = max(sent.item(), posted, self._free[rank])
            self._free[rank] = begin + _num_bytes(value) / self._bytes_per_s
            self._values[rank, earliest] = self._free[rank] + self._latency_s, value
        arrival, value = self._values.pop((rank, label))
        time.sleep(max(0.0, arrival - time.monotonic()))
        return value


def _num_bytes(value: Any) -> int:
    return sum(
        v.nbytes for v in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(v, Tensor)
    )


def timed(step: Callable[[], object], steps: int) -> float:
    """Seconds until the last rank has run its steps."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def median_s(call: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds of a call."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def on_ranks(ranks: int, body: Callable[..., None], *arguments: Any) -> None:
    """Runs `body(rank, ranks, *arguments)` on ranks of gloo."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    mp.spawn(_start, args=(ranks, port, body, arguments), nprocs=ranks)  # type: ignore[no-untyped-call]


def _start(rank: int, ranks: int, port: int, body: Callable[..., None], arguments: Sequence[Any]) -> None:
    own = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in own.items()})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    body(rank, ranks, *arguments)
    dist.barrier()
    os._exit(0)  # the threads of the transports wait for messages that do not come
