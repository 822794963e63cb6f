"""Measures messages with the collectives that training uses: those of ds_zero, over the transports of ds_comm."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import ds_comm
import ds_zero
from ds_engine.device import synchronize
from ds_engine.step_time.rates import fitted
from ds_zero import _registry
from ds_zero.comm.collectives import Comm
from ds_zero.comm.ranks import Ranks

_NUMELS = (1 << 14, 1 << 22)
"""Elements of fp32: 64 KiB and 16 MiB."""
_ENOUGH_S = 2.0
"""A collective is not measured again when it has taken this long: on slow links that is exact enough."""
_ROUNDS = 5


def measured_links(device: torch.device) -> dict[str, Any]:
    """Returns the fields `gather`, `reduce` and `occupies` of `Rates`. Collective over all ranks."""
    model = nn.Linear(1, 1, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    collectives: Any = ds_comm.collectives()
    ds_zero.shard(model, optimizer, stage=1, comm=collectives)
    state = _registry.state_of(model)  # for its collectives, connected as those of a training
    comm, ranks = state.comm, state.ranks
    cpu, wall = time.process_time(), time.perf_counter()
    gathers = [
        _row(numel, ranks, _seconds(_gathering(comm, ranks, numel, device), device)) for numel in _NUMELS
    ]
    reductions = [
        _row(numel, ranks, _seconds(_reducing(comm, ranks, numel, device), device)) for numel in _NUMELS
    ]
    share = (time.process_time() - cpu) / (time.perf_counter() - wall)
    ds_zero.destroy(model)
    return {
        "gather": fitted(gathers),
        "reduce": fitted(reductions),
        "occupies": 0.0 if device.type != "cpu" else min(1.0, share),
    }


def _row(numel: int, ranks: Ranks, seconds: float) -> dict[str, float]:
    return {"bytes": 4.0 * numel, "ranks": ranks.size, "seconds": seconds}


def _gathering(comm: Comm, ranks: Ranks, numel: int, device: torch.device) -> Callable[[], None]:
    whole = torch.zeros(numel // ranks.size * ranks.size, device=device)

    def run() -> None:
        comm.gather(whole, ranks).wait()

    return run


def _reducing(comm: Comm, ranks: Ranks, numel: int, device: torch.device) -> Callable[[], None]:
    whole = torch.zeros(numel // ranks.size * ranks.size, device=device)
    out = whole.new_empty(whole.numel() // ranks.size)

    def run() -> None:
        comm.reduce(out, whole, ranks, dist.ReduceOp.SUM).wait()

    return run


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    """Median duration on this rank; all ranks begin together."""
    taken: list[float] = []
    enough = torch.zeros(1, device=device)
    for number in range(_ROUNDS + 1):
        dist.barrier()
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        if number:  # the first makes connections
            taken.append(time.perf_counter() - start)
        enough.fill_(float(sum(taken) > _ENOUGH_S))
        dist.all_reduce(enough, dist.ReduceOp.MAX)
        if enough.item():
            break
    return statistics.median(taken)
