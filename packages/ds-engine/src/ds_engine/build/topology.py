"""Determines the topology of a job from the configuration, or from an `mpu` object with Megatron-LM's methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import ds_zero
from ds_engine.build.layers.tensor import model_parallel
from ds_engine.config import ConfigError, DsConfig
from ds_engine.interfaces import World
from ds_engine.job.topology import Axis, Topology


@dataclass(frozen=True, kw_only=True)
class Meshes:
    """The process groups of a topology."""

    data: DeviceMesh | None = None
    """Mesh over the axes `replicate` (if it has several ranks) and "data", which is data x sequence here; None: all
    ranks of the process group."""
    tensor: dist.ProcessGroup | None = None
    """The ranks that share each layer, if the engine has cut them; None: layers are whole, or cut by the caller."""
    sequence: dist.ProcessGroup | None = None
    """The ranks that process the other tokens of the same samples; None: sequences are not divided."""
    model_parallel: ds_zero.ModelParallel | None = None
    """Process group of the model-parallel ranks."""
    mesh_for: ds_zero.MeshFor | None = None
    """Returns the mesh of parameters that have another one than `data`."""
    experts: bool = False
    """Whether some of these parameters are experts that are divided among ranks."""


def arranged(settings: DsConfig, rank: int, num_ranks: int, tensor: int | None = None) -> Topology:
    """Returns the configured topology, with the coordinates of one rank.

    Args:
        tensor: number of ranks that share a layer. Default: as configured.

    Raises:
        ConfigError: `mics_shard_size`, `sequence_parallel_size` or the number of tensor-parallel ranks does not divide
            the number of ranks.
    """
    parts = tensor or settings.tensor_parallel.ranks
    if num_ranks % parts:
        raise ConfigError(
            [
                f"tensor_parallel: {parts} ranks that share a layer do not divide {num_ranks} ranks into groups: set "
                "autotp_size to a divisor, or start another number of ranks"
            ]
        )
    part, rank, num_ranks = Axis(rank % parts, parts), rank // parts, num_ranks // parts
    sequence = settings.sequence_parallel_size or 1
    if num_ranks % sequence:
        raise ConfigError(
            [
                f"sequence_parallel_size {sequence} does not divide {num_ranks} ranks into groups: set it to a "
                "divisor, or start another number of ranks"
            ]
        )
    num_data = num_ranks // sequence
    data, tokens = Axis(rank // sequence, num_data), Axis(rank % sequence, sequence)
    size = settings.zero_optimization.mics_shard_size
    if size <= 0:
        return Topology(data=data, sequence=tokens, tensor=part, logical=parts > 1)
    if num_data % size:
        raise ConfigError(
            [
                f"zero_optimization.mics_shard_size {size} does not divide {num_data} data-parallel ranks into groups: "
                "set it to a divisor, or to -1 for one group"
            ]
        )
    return Topology(
        replicate=Axis(data.index // size, num_data // size),
        data=Axis(data.index % size, size),
        sequence=tokens,
        tensor=part,
        logical=parts > 1,
    )


def topology_of(
    settings: DsConfig, world: World, mpu: Any = None, tensor: int | None = None
) -> tuple[Topology, Meshes]:
    """Returns the topology of the running ranks, and its groups. Collective if it creates groups.

    In norms, a parameter with the attribute `tensor_model_parallel` or `model_parallel` counts on every rank of the
    model-parallel group. Any other parameter counts on tensor-parallel rank 0 only, which includes all pipeline
    stages.

    Args:
        tensor: number of ranks that share a layer. Default: as configured.

    Raises:
        ValueError: `mpu` lacks a method.
        ConfigError: settings that contradict `mpu`, or do not fit the number of ranks.
    """
    if mpu is None:
        return _of_settings(arranged(settings, world.rank, world.world_size, tensor), world)
    if (tensor or settings.tensor_parallel.ranks) > 1:
        raise ConfigError(
            ["tensor_parallel cuts the layers of a model, but with mpu it is cut already: remove one of them"]
        )
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
    if _sequence_size(mpu, settings) > 1:
        return _with_sequence(mpu, Axis(rank, size), parts, world)
    data = DeviceMesh.from_group(group, world.device.type, mesh_dim_names=("data",))
    if parts == 1:
        return Topology(data=Axis(rank, size)), Meshes(data=data)
    across = _ask(mpu, "get_model_parallel_group", "get_tensor_model_parallel_group")
    first = int(_ask(mpu, *_TENSOR_RANK)) == 0
    marked = ds_zero.ModelParallel(group=across, is_cut=counts_on(first))
    # Pipeline and tensor parallelism form one axis here: only the part of the model that a rank holds matters.
    topology = Topology(data=Axis(rank, size), tensor=Axis(dist.get_rank(across), parts))
    return topology, Meshes(data=data, model_parallel=marked)


_TENSOR_RANK = ("get_tensor_model_parallel_rank", "get_slice_parallel_rank", "get_model_parallel_rank")


def _sequence_size(mpu: Any, settings: DsConfig) -> int:
    """Returns the number of ranks that divide a sequence according to `mpu`.

    Raises:
        ConfigError: the configuration has another number.
    """
    ask = getattr(mpu, "get_sequence_parallel_world_size", None)
    size = int(ask()) if callable(ask) else 1
    if settings.sequence_parallel_size not in (None, size):
        raise ConfigError(
            [
                f"sequence_parallel_size is {settings.sequence_parallel_size}, and mpu has {size} sequence-parallel "
                "ranks: remove it, or set it to the same number"
            ]
        )
    return size


def _with_sequence(mpu: Any, data: Axis, parts: int, world: World) -> tuple[Topology, Meshes]:
    """Returns the topology of an `mpu` whose ranks divide sequences."""
    if parts > 1:
        raise ValueError(
            f"mpu has {parts} model-parallel and several sequence-parallel ranks, which is not supported together: use "
            "one of them"
        )
    tokens = Axis(
        int(_ask(mpu, "get_sequence_parallel_rank")), int(_ask(mpu, "get_sequence_parallel_world_size"))
    )
    topology = Topology(data=data, sequence=tokens)
    if topology.world_size != world.world_size:
        raise ValueError(
            f"mpu has {data.size} data-parallel x {tokens.size} sequence-parallel ranks, and there are "
            f"{world.world_size} ranks: get_data_parallel_world_size must count only ranks with other samples"
        )
    return topology, Meshes(sequence=_ask(mpu, "get_sequence_parallel_group"))


def _of_settings(topology: Topology, world: World) -> tuple[Topology, Meshes]:
    """Returns a configured topology, with its groups: ranks that share a layer are consecutive, and those that share a
    sequence are next to each other.
    """
    device = world.device.type
    replicas, shards, parts = topology.replicate.size, topology.shards.size, topology.tensor.size
    sequence = data = across = None
    if topology.sequence.size > 1:
        sizes = (topology.samples.size, topology.sequence.size, parts)
        mesh = init_device_mesh(device, sizes, mesh_dim_names=("samples", "sequence", "tensor"))
        sequence = mesh["sequence"].get_group()
    if replicas > 1 or parts > 1:
        mesh = init_device_mesh(
            device, (replicas, shards, parts), mesh_dim_names=("replicate", "data", "tensor")
        )
        data = mesh["replicate", "data"] if replicas > 1 else mesh["data"]
        across = mesh["tensor"].get_group() if parts > 1 else None
    return topology, Meshes(
        data=data,
        sequence=sequence,
        tensor=across,
        model_parallel=model_parallel(across) if across is not None else None,
    )


def counts_on(first: bool) -> Callable[[str, nn.Parameter], bool]:
    """Returns which parameters norms count on a rank; `first`: whether it is the first of its tensor ranks."""

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
