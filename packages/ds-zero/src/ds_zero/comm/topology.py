"""The topology of one model: which ranks shard which parameter, and over which ranks a norm is summed.

[Note: who counts a gradient]
The squares of all gradients are added over the ranks that hold different parts of them. Over the data axis slices are
disjoint, so all count. Replicas are equal, so sums stay within one replica. In a model-parallel group, a parameter
that is split counts on every member; a parameter that all members hold counts on the first. Experts are sharded over
another mesh; its ranks and those of the other experts together are the data axis, so their slices are disjoint there,
too.

[Note: stacked parameters]
Weights of experts are often one tensor, whose first dimension is the experts. Under expert parallelism each rank has an
equal run of it. A `mesh_for` with the method `stacked_over` tells so: the parameter is then part of one logical tensor
for all experts. Checkpoints contain that tensor, so that another number of expert-parallel ranks can load it, and
`full_state_dict` returns it. Other parameters with a mesh of their own have as many values under one name as there are
sets of ranks; checkpoints distinguish these by coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ds_zero.comm.ranks import Group, Ranks, ranks_of
from ds_zero.layout.tensor_parts import TensorPart, TensorParts

MeshFor = Callable[[str, nn.Parameter], DeviceMesh | Ranks | None]
"""A function from a parameter's name and the parameter to the mesh over which it is sharded; None: the model's mesh.
That mesh is a part of the model's (an expert that some of the ranks hold), or several times as large (a parameter that
is tied over pipeline stages: the data ranks of all of them)."""


@runtime_checkable
class KnowsStacks(Protocol):
    """A `MeshFor` that knows which parameters are runs of stacked ones, [Note: stacked parameters]."""

    def stacked_over(self, fqn: str, param: nn.Parameter) -> DeviceMesh | Ranks | None:
        """Returns the ranks of which rank r holds the r-th of equal runs along the first dimension; None: the
        parameter is no such run.
        """


def cut_by_model_parallelism(fqn: str, param: nn.Parameter) -> bool:
    """Whether a parameter has the attribute by which Megatron or DeepSpeed marks parameters that are split among
    model-parallel ranks.
    """
    return any(bool(getattr(param, mark, False)) for mark in ("tensor_model_parallel", "model_parallel"))


@dataclass(frozen=True, kw_only=True)
class ModelParallel:
    """The model-parallel axis (tensor or pipeline parallelism) of a model that `shard` shards along the data axis."""

    group: Group
    """Ranks that together hold one model: all tensor- and pipeline-parallel ranks of one data-parallel index. A mesh
    of one axis, or a process group.
    """
    is_cut: Callable[[str, nn.Parameter], bool] = cut_by_model_parallelism
    """Whether the members of the group hold different values under a parameter's name (parts of it, or another stage's
    parameter). Other parameters are equal on all members, and norms count them once."""
    part_of: Callable[[str, nn.Parameter], TensorPart | None] | None = None
    """The part of a whole tensor that a parameter is; None: it is whole. With this function, records are those of
    whole tensors ([Note: logical tensors]), which load on any number of members. Without it, they have the tensors of
    this rank."""
    part_group: Group | None = None
    """With `part_of`, the ranks that hold the parts of the same tensors, of which the first one writes the records of
    tensors that are whole: in a pipeline, the tensor-parallel ranks of one stage. None: those of `group`."""


@dataclass(frozen=True)
class Topology:
    """The ranks with which `shard` was called."""

    axes: tuple[Ranks, ...]
    """Axes over which parameters are sharded; the first is the data axis of the model."""
    axis_of: Mapping[str, int]
    """Axis of the parameters that do not use the first."""
    norm_groups: tuple[Ranks, ...]
    """[Note: who counts a gradient]"""
    uncounted: frozenset[str]
    """Parameters that another rank counts in norms."""
    stacked: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """For runs of stacked parameters, (index of the run, number of runs). [Note: stacked parameters]"""
    tensor_parts: TensorParts | None = None
    """Which parts of whole tensors this rank holds; None: records are those of this rank's tensors."""
    part_ranks: Ranks | None = None
    """The ranks that hold the other parts."""


def topology_of(
    params: Mapping[str, nn.Parameter],
    mesh: Group | Ranks | None,
    mesh_for: MeshFor | None,
    model_parallel: ModelParallel | Group | None,
) -> Topology:
    """Determines the topology of a model's parameters.

    Raises:
        ValueError: incompatible meshes.
    """
    main = ranks_of(mesh)
    axes, axis_of = [main], {}
    known: dict[DeviceMesh | Ranks, int] = {}
    stacked: dict[str, tuple[int, int]] = {}
    for fqn, param in params.items() if mesh_for is not None else ():
        assert mesh_for is not None
        own = mesh_for(fqn, param)
        if own is None:
            continue
        if own not in known:
            known[own] = len(axes)
            axes.append(_expert_ranks(own, main, fqn))
        axis_of[fqn] = index = known[own]
        across = _stacked_over(mesh_for, fqn, param)
        if across is not None:
            others = ranks_of(across)
            stacked[fqn] = (others.rank, others.size)
            axes[index] = replace(axes[index], across=others)
    groups, uncounted = [main], frozenset[str]()
    tensor_parts = part_ranks = None
    if model_parallel is not None:
        if not isinstance(model_parallel, ModelParallel):
            model_parallel = ModelParallel(group=model_parallel)
        across = ranks_of(model_parallel.group)
        groups.append(across)
        if across.rank > 0:
            uncounted = frozenset(n for n, p in params.items() if not model_parallel.is_cut(n, p))
        if model_parallel.part_of is not None:
            parts = {n: model_parallel.part_of(n, p) for n, p in params.items()}
            known_parts = {n: part for n, part in parts.items() if part is not None}
            part_ranks = across if model_parallel.part_group is None else ranks_of(model_parallel.part_group)
            tensor_parts = TensorParts(parts=known_parts, first=part_ranks.rank == 0)
    return Topology(tuple(axes), axis_of, tuple(groups), uncounted, stacked, tensor_parts, part_ranks)


def _stacked_over(mesh_for: object, fqn: str, param: nn.Parameter) -> DeviceMesh | Ranks | None:
    return mesh_for.stacked_over(fqn, param) if isinstance(mesh_for, KnowsStacks) else None


def numbered(topology: Topology, device: torch.device) -> Topology:
    """Numbers the sets of ranks that hold different experts, by their first ranks. Collective if there are several."""
    main, others = topology.axes[0], topology.axes[1:]
    if not others or main.group is None or any(ranks.part[1] > 1 for ranks in others):
        return topology
    mine = torch.tensor([_first_rank(ranks) for ranks in others], device=device)
    gathered = [torch.empty_like(mine) for _ in range(main.size)]
    dist.all_gather(gathered, mine, group=main.group)
    axes = [main]
    for ranks, first, column in zip(others, mine.tolist(), torch.stack(gathered).T.tolist(), strict=True):
        sets = sorted(set(column))
        axes.append(replace(ranks, part=(sets.index(first), len(sets))))
    return replace(topology, axes=tuple(axes))


def _first_rank(ranks: Ranks) -> int:
    return dist.get_rank() if ranks.group is None else min(dist.get_process_group_ranks(ranks.group))


def _expert_ranks(mesh: DeviceMesh | Ranks, main: Ranks, fqn: str) -> Ranks:
    """Experts process the tokens of all data-parallel ranks, so gradients are averaged over all of these. Replicas of
    the model are replicas of its experts, too. Gradients of a tied parameter are added over its stages, and averaged
    over the data-parallel ranks of one.
    """
    divided = ranks_of(mesh)
    copies = main.replicas.size if main.replicas is not None else 1
    own_copies = divided.replicas.size if divided.replicas is not None else 1
    if own_copies != copies:
        axes = "one axis" if copies == 1 else f"two axes (replicate, shard), the first with {copies} ranks"
        raise ValueError(
            f"mesh_for gives {fqn!r} a mesh of {divided.total} ranks in {len(divided.axes)} axes: the model's mesh has "
            f"{len(main.axes)}, so give it {axes}"
        )
    if main.size % divided.size and divided.size % main.size:
        raise ValueError(
            f"mesh_for gives {fqn!r} a mesh of {divided.size} ranks: the size must divide the {main.size} ranks over "
            "which the model is sharded, or be a multiple of it"
        )
    return replace(divided, mean_over=main.total, axis="expert")
