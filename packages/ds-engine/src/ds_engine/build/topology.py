"""Determines the topology of a job from the configuration, or from an `mpu` object with Megatron-LM's methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import ds_zero
from ds_engine.config import ConfigError, DsConfig
from ds_engine.interfaces import World
from ds_engine.job.topology import Axis, Topology


@dataclass(frozen=True, kw_only=True)
class Meshes:
    """The process groups of a topology."""

    data: DeviceMesh | None = None
    """Mesh over the axes `replicate` (if it has several ranks) and `data`; None: all ranks of the process group."""
    model_parallel: ds_zero.ModelParallel | None = None
    """Process group of the model-parallel ranks."""


def arranged(settings: DsConfig, rank: int, num_ranks: int) -> Topology:
    """Returns the configured topology, with the coordinates of one rank.

    Raises:
        ConfigError: `mics_shard_size` does not divide the number of ranks.
    """
    size = settings.zero_optimization.mics_shard_size
    if size <= 0:
        return Topology(data=Axis(rank, num_ranks))
    if num_ranks % size:
        raise ConfigError(
            [
                f"zero_optimization.mics_shard_size {size} does not divide {num_ranks} ranks into groups: set it to a "
                "divisor, or to -1 for one group"
            ]
        )
    return Topology(replicate=Axis(rank // size, num_ranks // size), data=Axis(rank % size, size))


def topology_of(settings: DsConfig, world: World, mpu: Any = None) -> tuple[Topology, Meshes]:
    """Returns the topology of the running ranks, and its groups. Collective if it creates groups.

    In norms, a parameter with the attribute `tensor_model_parallel` or `model_parallel` counts on every rank of the
    model-parallel group. Any other parameter counts on tensor-parallel rank 0 only, which includes all pipeline
    stages.

    Raises:
        ValueError: `mpu` lacks a method.
        ConfigError: settings that contradict `mpu`, or do not fit the number of ranks.
    """
    if mpu is None:
        topology = arranged(settings, world.rank, world.world_size)
        return topology, Meshes(data=_data_mesh(topology, world))
    if settings.zero_optimization.mics_shard_size > 0:
        raise ConfigError(
            [
                "zero_optimization.mics_shard_size divides all ranks into groups, but mpu defines its own "
                "groups: remove one of them"
            ]
        )
    group = _ask(mpu, "get_data_parallel_group")
    size = int(_ask(mpu, "get_data_parallel_world_size"))
    rank = int(_ask(mpu, "get_data_parallel_rank"))
    parts = int(_ask(mpu, "get_model_parallel_world_size", "get_tensor_model_parallel_world_size"))
    data = DeviceMesh.from_group(group, world.device.type, mesh_dim_names=("data",))
    if parts == 1:
        return Topology(data=Axis(rank, size)), Meshes(data=data)
    across = _ask(mpu, "get_model_parallel_group", "get_tensor_model_parallel_group")
    first = int(_ask(mpu, *_TENSOR_RANK)) == 0
    model_parallel = ds_zero.ModelParallel(group=across, is_cut=_counts(first))
    # Pipeline and tensor parallelism form one axis here: only the part of the model that a rank holds matters.
    topology = Topology(data=Axis(rank, size), tensor=Axis(dist.get_rank(across), parts))
    return topology, Meshes(data=data, model_parallel=model_parallel)


_TENSOR_RANK = ("get_tensor_model_parallel_rank", "get_slice_parallel_rank", "get_model_parallel_rank")


def _data_mesh(topology: Topology, world: World) -> DeviceMesh | None:
    """Returns a mesh in which consecutive ranks share a model and the groups are replicas. None: one group."""
    if topology.replicate.size == 1:
        return None
    sizes = {"replicate": topology.replicate.size, "data": topology.data.size}
    return init_device_mesh(world.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def _counts(first: bool) -> Callable[[str, nn.Parameter], bool]:
    def counts(fqn: str, param: nn.Parameter) -> bool:
        return first or ds_zero.cut_by_model_parallelism(fqn, param)

    return counts


def _ask(mpu: Any, *names: str) -> Any:
    for name in names:
        method = getattr(mpu, name, None)
        if method is not None:
            return method()
    raise ValueError(
        f"mpu: {type(mpu).__name__} has no method {' or '.join(names)}: pass an object with Megatron's methods for "
        "data- and model-parallel groups, ranks and sizes"
    )
