"""Measures collectives between the ranks of a job: of the backend, and through shared memory where possible."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm.exchange.wire import bus_bytes
from ds_comm.same_host.collectives import SameHostGroup, connect_group

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all")
SIZES = (1 << 10, 1 << 16, 1 << 20, 1 << 26)
_TIME_S = 0.2
"""Seconds for one measurement of one collective."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One collective of one size."""

    collective: str
    transport: str
    """Backend of torch.distributed, or "same host"."""
    num_bytes: int
    """Of the largest tensor of the collective on one rank."""
    ranks: int
    seconds: float
    """Median duration of a call."""

    @property
    def sent_bytes(self) -> float:
        """Bytes that the best algorithm sends from each rank, as in `ds_comm.exchange.wire.bus_bytes`."""
        return bus_bytes(self.collective, self.num_bytes, self.ranks)

    @property
    def bytes_per_s(self) -> float:
        """`sent_bytes` per second: comparable between collectives and numbers of ranks ("bus bandwidth")."""
        return self.sent_bytes / self.seconds


def measure(
    sizes: Sequence[int] = SIZES,
    collectives: Sequence[str] = COLLECTIVES,
    *,
    rounds: int = 5,
    device: torch.device | None = None,
) -> list[Timing]:
    """Measures collectives of fp32 tensors between all ranks of the job, in turn. Collective.

    Args:
        sizes: bytes of the largest tensor of a collective, rounded up to a multiple of 4 bytes for each rank.
        collectives: some of `COLLECTIVES`.
        rounds: number of measurements of every size and transport; the median counts.
        device: device of the tensors; shared memory is measured on the CPU only. Default: the CPU.

    Returns:
        The timings; the same on every rank.
    """
    device = device or torch.device("cpu")
    near = connect_group() if device.type == "cpu" else None
    backend = str(dist.get_backend())
    timings: list[Timing] = []
    for size in sizes:
        for collective in collectives:
            calls = dict(_calls(collective, size, device, near, backend))
            repeats = {name: _repeats(call) for name, call in calls.items()}
            seconds: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(rounds):  # interleaved, since the machine may have other work at times
                for name, call in calls.items():
                    seconds[name].append(_time(call, repeats[name]))
            for name, values in seconds.items():
                timings.append(
                    Timing(
                        collective=collective,
                        transport=name,
                        num_bytes=size,
                        ranks=dist.get_world_size(),
                        seconds=_slowest(statistics.median(values)),
                    )
                )
    if near is not None:
        dist.barrier()
        near.close()
    return timings


def _calls(
    collective: str, size: int, device: torch.device, near: SameHostGroup | None, backend: str
) -> Iterator[tuple[str, Callable[[], object]]]:
    ranks = dist.get_world_size()
    part = torch.ones(-(-size // (4 * ranks)), device=device)
    whole, other = part.repeat(ranks), part.repeat(ranks)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    # The maximum, because sums would overflow after some calls.
    most = dist.ReduceOp.MAX
    own: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(whole, most),
        "all_gather": lambda: gather(whole, part),
        "reduce_scatter": lambda: scatter(part, whole, most),
        "broadcast": lambda: dist.broadcast(whole, 0),
        "all_to_all": lambda: dist.all_to_all_single(other, whole),
    }
    yield backend, _finished(own[collective], device)
    if near is not None:
        yield "same host", _near(near, collective, whole, part, other)


def _near(
    near: SameHostGroup, collective: str, whole: Tensor, part: Tensor, other: Tensor
) -> Callable[[], object]:
    return {
        "all_reduce": lambda: near.all_reduce(whole, "max"),
        "all_gather": lambda: near.all_gather(whole, part),
        "reduce_scatter": lambda: near.reduce_scatter(part, whole, "max"),
        "broadcast": lambda: near.broadcast(whole, 0),
        "all_to_all": lambda: near.all_to_all(other, whole),
    }[collective]


def _finished(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Returns a call that also waits for the device."""
    if device.type == "cpu":
        return call

    def run() -> None:
        call()
        torch.accelerator.synchronize(device)

    return run


def _repeats(call: Callable[[], object]) -> int:
    """Returns the number of calls that take `_TIME_S`; the same on every rank."""
    _time(call, 2)
    return max(1, min(1000, int(_TIME_S / _slowest(_time(call, 2)))))


def _time(call: Callable[[], object], repeats: int) -> float:
    """Returns the seconds of one call."""
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def _slowest(seconds: float) -> float:
    value = torch.tensor([seconds], dtype=torch.float64)
    if "gloo" in str(dist.get_backend()):
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return float(value)
    moved = value.float().to(torch.accelerator.current_accelerator() or "cpu")
    dist.all_reduce(moved, dist.ReduceOp.MAX)
    return float(moved)
