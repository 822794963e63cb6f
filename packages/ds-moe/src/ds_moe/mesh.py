"""Which ranks hold which experts, and which ranks hold the same.

[Note: experts fold inside data]
The data axis of the job is cut in two: data = expert_data x expert. The `ep_size` ranks of a row hold all experts of a
layer, each an equal run; they exchange tokens. The ranks of a column hold the same experts, with the tokens of other
rows; over them expert weights are sharded and their gradients summed. All other parameters use the whole data axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

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

    def connect(self, to: ExpertGroup) -> None:
        """Sets the ranks that hold the experts."""

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

    Args:
        mesh: the data axes of the job on all ranks, (data,) or (replicate, shard). None: all ranks, one axis.
            [Note: experts fold inside data]
        all_to_all: exchanges rows of tokens.

    Raises:
        ExpertParallelError: an `ep_size` does not divide the data axis.
    """
    layers = list(expert_parallel_layers(model))
    device = next((p.device.type for p in model.parameters() if not p.is_meta), _default_device())
    meshes: dict[int, DeviceMesh] = {}
    for size in sorted({layer.ep_size for _, layer in layers if layer.ep_size > 1}):
        meshes[size] = folded(mesh, size, device)
    sizes: dict[str, int] = {}
    stacked: set[str] = set()
    for name, layer in layers:
        if layer.ep_size == 1:
            continue
        axis = meshes[layer.ep_size]["expert"]
        layer.connect(ExpertGroup(axis.get_group(), axis.get_local_rank(), axis.size(), all_to_all))
        for own, is_stacked in layer.expert_parameters().items():
            fqn = f"{name}.{own}" if name else own
            sizes[fqn] = layer.ep_size
            if is_stacked:
                stacked.add(fqn)
    return ExpertMesh(meshes, sizes, frozenset(stacked))


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
    ranks = mesh.mesh if mesh is not None else torch.arange(dist.get_world_size())
    if ranks.ndim > 2:
        raise ExpertParallelError(
            f"the mesh has {ranks.ndim} axes: pass its data axes, (data,) or (replicate, shard)"
        )
    if ranks.numel() != dist.get_world_size():
        raise ExpertParallelError(
            f"the mesh has {ranks.numel()} of the job's {dist.get_world_size()} ranks: experts beside tensor or "
            "pipeline parallelism are not supported"
        )
    shard = ranks.shape[-1]
    if shard % ep_size:
        raise ExpertParallelError(
            f"ep_size={ep_size} must divide the data axis, over which parameters are sharded, with {shard} ranks"
        )
    cut = ranks.reshape(*ranks.shape[:-1], shard // ep_size, ep_size)
    names = (*(("replicate",) if ranks.ndim == 2 else ()), "expert_data", "expert")
    return DeviceMesh(device_type, cut, mesh_dim_names=names)
