"""Which ranks hold which experts, and which ranks hold the same.

[Note: experts fold inside data]
The data axis of the job is cut in two: data = expert_data x expert. The `ep_size` ranks of a row hold all experts of a
layer, each an equal run; they exchange tokens. The ranks of a column hold the same experts, with the tokens of other
rows; over them expert weights are sharded and their gradients summed. All other parameters use the whole data axis.
Ranks of other tensor-parallel parts or pipeline stages have a data axis of their own, which is cut in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ds_moe.dispatch.exchange import ExpertGroup, torch_all_to_all
from ds_moe.errors import ExpertParallelError
from ds_moe.interfaces import AllToAll


@runtime_checkable
class ExpertParallel(Protocol):
    """A module whose experts may be divided among ranks."""

    ep_size: int
    divides_experts: bool

    @property
    def expert_index(self) -> int:
        """Which of `ep_size` equal runs of experts this rank holds."""

    def set_expert_index(self, index: int) -> None:
        """Says that the values of the experts are those of another run now."""

    def expert_values(self) -> list[torch.Tensor]:
        """Returns the parameters and buffers of this rank's experts."""

    def connect(self, to: ExpertGroup) -> None:
        """Sets the ranks that hold the experts."""

    def tensor_dims(self) -> dict[str, tuple[int, int]]:
        """Returns name -> dimension along which tensor-parallel ranks cut a parameter, and number of its sections."""

    def divide(self, group: dist.ProcessGroup) -> None:
        """Says that these parameters are this rank's parts now, among the ranks of `group`."""

    def expert_parameters(self) -> dict[str, bool]:
        """Returns the names of the parameters of experts within the module, and whether their first dimension is the
        experts.
        """


class ExpertMesh:
    """From a parameter's name to the ranks that hold the same experts: the `mesh_for` of `ds_zero.shard`."""

    def __init__(
        self, meshes: Mapping[int, DeviceMesh], sizes: Mapping[str, int], stacked: frozenset[str]
    ) -> None:
        """
        Args:
            meshes: for each `ep_size`, the mesh with the axes (expert_data, expert), or (replicate, expert_data,
                expert).
            sizes: name of each expert parameter -> `ep_size` of its layer.
            stacked: names of parameters whose first dimension is the experts of this rank.
        """
        self._meshes, self._sizes, self._stacked = dict(meshes), dict(sizes), stacked

    def __call__(self, name: str, param: nn.Parameter) -> DeviceMesh | None:
        """Returns the mesh over which a parameter is sharded; None: the one of the model."""
        size = self._sizes.get(name)
        if size is None:
            return None
        mesh = self._meshes[size]
        axes = [axis for axis in mesh.mesh_dim_names or () if axis != "expert"]
        return mesh[tuple(axes)] if len(axes) > 1 else mesh[axes[0]]

    def stacked_over(self, name: str, param: nn.Parameter) -> DeviceMesh | None:
        """Returns the ranks of which rank r holds the r-th of equal runs, along the first dimension, of one tensor for
        all experts; None for parameters that are not stacked.
        """
        return self._meshes[self._sizes[name]]["expert"] if name in self._stacked else None

    def __contains__(self, name: object) -> bool:
        """Whether a parameter belongs to experts that are divided among ranks."""
        return name in self._sizes

    @property
    def meshes(self) -> Mapping[int, DeviceMesh]:
        """`ep_size` -> mesh."""
        return self._meshes


def expert_mesh(
    model: nn.Module, mesh: DeviceMesh | None = None, *, all_to_all: AllToAll = torch_all_to_all
) -> ExpertMesh:
    """Connects all mixtures of experts in a model with their groups of ranks, and returns the `mesh_for` of
    `ds_zero.shard`. Collective; every rank of the job must call it, once, before the first forward.

    A layer decides when it is made which experts it holds, by the number of the rank. If another rank of the data axis
    is this one (beside tensor parallelism), the experts' values are sent to where they belong.

    Args:
        mesh: the data axes of the job, (data,) or (replicate, shard). None: all ranks, one axis. Beside tensor or
            pipeline parallelism, each rank passes the axes of its own data ranks.
            [Note: experts fold inside data]
        all_to_all: exchanges rows of tokens.

    Raises:
        ExpertParallelError: an `ep_size` does not divide the data axis.
    """
    layers = list(expert_parallel_layers(model))
    device = next((p.device.type for p in model.parameters() if not p.is_meta), _default_device())
    meshes: dict[int, DeviceMesh] = {}
    for size in _sizes_of_all_ranks({layer.ep_size for _, layer in layers if layer.ep_size > 1}, mesh):
        meshes[size] = folded(mesh, size, device)
    sizes: dict[str, int] = {}
    stacked: set[str] = set()
    divided = [(name, layer) for name, layer in layers if layer.ep_size > 1]
    move_experts({n: (layer, meshes[layer.ep_size]["expert"].get_local_rank()) for n, layer in divided}, mesh)
    for name, layer in divided:
        axis = meshes[layer.ep_size]["expert"]
        layer.connect(ExpertGroup(axis.get_group(), axis.get_local_rank(), axis.size(), all_to_all))
        for own, is_stacked in layer.expert_parameters().items():
            fqn = f"{name}.{own}" if name else own
            sizes[fqn] = layer.ep_size
            if is_stacked:
                stacked.add(fqn)
        for adapter in _adapters(model, name, layer):
            sizes[adapter] = layer.ep_size
    return ExpertMesh(meshes, sizes, frozenset(stacked))


def _adapters(model: nn.Module, name: str, layer: ExpertParallel) -> list[str]:
    """Returns the names of parameters of adapters around the experts of a layer, which differ between its ranks as the
    experts do. PEFT's wrappers have what they wrap as `base_layer`; those of several weights are nested.
    """
    outer = name
    while outer.endswith(".base_layer"):
        outer = outer.removesuffix(".base_layer")
    if outer == name:
        return []
    own = {f"{name}.{n}" for n in layer.expert_parameters()}
    prefix = f"{outer}."
    return [n for n, _ in model.named_parameters() if n.startswith(prefix) and n not in own]


def _is_whole(mesh: DeviceMesh | None) -> bool:
    """Whether the data axes are all ranks of the job, so that all ranks have the same layers."""
    return mesh is None or mesh.mesh.numel() == dist.get_world_size()


def _gathered(own: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def _sizes_of_all_ranks(own: set[int], mesh: DeviceMesh | None) -> list[int]:
    """Returns the sizes of expert axes in ascending order. Pipeline stages may have other layers than this rank, and
    groups are made by all ranks together.
    """
    return sorted(own if _is_whole(mesh) else set().union(*_gathered(own)))


def move_experts(layers: Mapping[str, tuple[ExpertParallel, int]], mesh: DeviceMesh | None) -> None:
    """Sends runs of experts between ranks, so that every rank has those of its index in the expert axis. Collective.

    Args:
        layers: name -> layer, and the index that this rank should hold.
        mesh: as for `expert_mesh`.

    Raises:
        ExpertParallelError: on every rank, if values are to be sent that do not exist yet.
    """
    if mesh is None or mesh.mesh.flatten().tolist() == list(range(dist.get_world_size())):
        return  # ranks are consecutive, as the layers took them to be
    held = {name: (layer.expert_index, index) for name, (layer, index) in layers.items()}
    everyone: list[dict[str, tuple[int, int]]] = _gathered(held)
    names = sorted({name for ranks in everyone for name in ranks})
    rank = dist.get_rank()
    if any(p.is_meta for layer, _ in layers.values() for p in layer.expert_values()):
        moved = [n for n, (now, then) in held.items() if now != then]
        raise ExpertParallelError(
            f"{(moved or names)[0]!r}: experts beside tensor parallelism change their ranks, but have no values yet: "
            "construct the model without ds_zero.deferred_init"
        )
    for name in names:
        holders = {r: ranks[name] for r, ranks in enumerate(everyone) if name in ranks}
        first = {now: r for r, (now, _) in sorted(holders.items(), reverse=True)}
        moves = [(first[then], r) for r, (now, then) in sorted(holders.items()) if now != then]
        if all(rank not in move for move in moves):
            continue
        values = [p.detach() for p in layers[name][0].expert_values()]
        before = [v.clone() for v in values]
        for source, target in moves:
            for value, old in zip(values, before, strict=True):
                if rank == source:
                    dist.send(old.contiguous(), target)
                elif rank == target:
                    received = torch.empty_like(old, memory_format=torch.contiguous_format)
                    dist.recv(received, source)
                    value.copy_(received)
    for layer, index in layers.values():
        layer.set_expert_index(index)


def expert_sizes(model: nn.Module) -> dict[str, int]:
    """Returns the name of each parameter of experts that are divided among ranks -> `ep_size` of its layer."""
    return {
        f"{name}.{own}" if name else own: layer.ep_size
        for name, layer in expert_parallel_layers(model)
        if layer.ep_size > 1
        for own in layer.expert_parameters()
    }


def connect_for_plan(model: nn.Module, group_of: Callable[[int], dist.ProcessGroup]) -> None:
    """Connects all layers that divide their experts with groups that send nothing, so that the model can be run without
    values. [Note: loads without values]

    Args:
        group_of: returns a group of a number of ranks, of which this process is rank 0.
    """
    for _, layer in expert_parallel_layers(model):
        if layer.ep_size > 1:
            layer.connect(ExpertGroup(group_of(layer.ep_size), 0, layer.ep_size))


def expert_parallel_layers(model: nn.Module) -> list[tuple[str, ExpertParallel]]:
    """Returns (name, layer) of all layers whose experts may be divided among ranks."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ExpertParallel)]


def _default_device() -> str:
    current = torch.accelerator.current_accelerator()
    return current.type if current is not None else "cpu"


def folded(mesh: DeviceMesh | None, ep_size: int, device_type: str) -> DeviceMesh:
    """Cuts the last axis of a data mesh in two. Collective."""
    if not dist.is_initialized():
        raise ExpertParallelError(
            f"ep_size={ep_size} needs that many ranks: call torch.distributed.init_process_group first"
        )
    own = mesh.mesh if mesh is not None else torch.arange(dist.get_world_size())
    if own.ndim > 2:
        raise ExpertParallelError(
            f"the mesh has {own.ndim} axes: pass its data axes, (data,) or (replicate, shard)"
        )
    shard = own.shape[-1]
    if shard % ep_size:
        raise ExpertParallelError(
            f"ep_size={ep_size} must divide the data axis, over which parameters are sharded, with {shard} ranks"
        )
    names = (*(("replicate",) if own.ndim == 2 else ()), "expert_data", "expert")
    cut = own.reshape(*own.shape[:-1], shard // ep_size, ep_size)
    if _is_whole(mesh):
        return DeviceMesh(device_type, cut, mesh_dim_names=names)
    # The data axes of all parts of the model: groups are made by all ranks together.
    others = sorted({tuple(ranks) for ranks in _gathered(own.flatten().tolist())})
    parts = torch.tensor(others).reshape(len(others), *cut.shape)
    return DeviceMesh(device_type, parts, mesh_dim_names=("parts", *names))[names]
