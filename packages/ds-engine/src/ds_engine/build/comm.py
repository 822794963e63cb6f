"""Chooses the collectives of a job: through shared memory on one machine, and quantised ones (ZeRO++)."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

import ds_comm
from ds_comm.compress import IntCompressor
from ds_comm.exchange.hierarchy import Hierarchy
from ds_comm.exchange.quantized import QuantizedAllGather, QuantizedReduceScatter
from ds_engine.build.topology import Meshes
from ds_engine.interfaces import World
from ds_engine.job import Job


def collectives_of(job: Job, meshes: Meshes, world: World, given: Any = None) -> Any:
    """Returns the collectives for `ds_zero.shard`. Collective if gradients are reduced as int4 on several machines.

    Args:
        given: the argument `comm` of `initialize`: used where nothing is quantised.
    """
    base = given if given is not None else ds_comm.collectives()
    weights, gradients = job.quantized_weights, job.quantized_gradients
    if not weights and not gradients:
        return base
    exact = ds_comm.Collectives(all_gather=base.all_gather, reduce_scatter=base.reduce_scatter)
    # Secondary copies hold what was gathered, and replicas are reduced and gathered in turn: both stay exact.
    axes = {"secondary": exact, "replicate": exact, **base.axes}
    reduce = QuantizedReduceScatter(
        IntCompressor(bits=4, rounding="stochastic"), _hierarchy(job, meshes, world) if gradients else None
    )
    return ds_comm.Collectives(
        all_gather=QuantizedAllGather() if weights else base.all_gather,
        reduce_scatter=reduce if gradients else base.reduce_scatter,
        axes=axes,
        connect=base.connect,
    )


def _hierarchy(job: Job, meshes: Meshes, world: World) -> Hierarchy | None:
    """Returns the ranks on each machine and those with the same place; None: gradients are exchanged in one hop."""
    group = meshes.data.get_group("data") if meshes.data is not None else dist.group.WORLD
    size = job.topology.shards.size
    local = job.settings.zero_optimization.zero_hpz_partition_size
    if local <= 1:
        local = world.local_size
    if not 1 < local < size or size % local:
        return None
    assert isinstance(group, dist.ProcessGroup)
    return Hierarchy.of(local, group)
