"""Models whose parameters are DTensors, as Transformers' `tp_plan` makes them, as models of ordinary parameters.

Sharders such as ds_zero move parameters into buckets, for which a DTensor has no place. So each DTensor parameter is
replaced by an ordinary one, with this rank's part, under the same name. While a module runs, it finds DTensors in its
place that are made of these parts, and computes as before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from ds_layers.tensor import _registry
from ds_layers.tensor.cut import Cut


def localize(model: nn.Module, optimizer: Optimizer | None = None) -> DeviceMesh | None:
    """Replaces the DTensor parameters of a model by ordinary parameters with this rank's part.

    The model computes the same. An optimizer over the old parameters gets the new ones; it must not have states yet.

    Returns:
        The tensor-parallel mesh; None if the model has no DTensors.

    Raises:
        ValueError: parameters on several meshes or a mesh of several axes, parts of different sizes than
            `ds_layers.tensor.Cut`, or an optimizer that has states. Nothing has been changed then.
    """
    parts = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
    if not parts:
        return None
    mesh = _only_mesh(parts)
    cuts = {name: _cut(name, param) for name, param in parts.items()}
    if optimizer is not None and any(isinstance(p, DTensor) for p in optimizer.state):
        raise ValueError(
            "the optimizer has states of DTensor parameters: localize the model before the first step"
        )
    new: dict[int, nn.Parameter] = {}
    for name, param in parts.items():
        made = nn.Parameter(param.to_local().detach().clone(), requires_grad=param.requires_grad)
        cut = cuts[name]
        if cut is not None:
            _registry.note(made, cut)
        new[id(param)] = made
    for module in model.modules():
        _exchange(module, new)
    for group in optimizer.param_groups if optimizer is not None else ():
        group["params"] = [new.get(id(p), p) for p in group["params"]]
    return mesh


def _only_mesh(parts: dict[str, Any]) -> DeviceMesh:
    meshes = {param.device_mesh for param in parts.values()}
    mesh: DeviceMesh = next(iter(meshes))
    if len(meshes) > 1 or mesh.ndim != 1:
        raise ValueError(
            f"the parameters are DTensors on {len(meshes)} meshes, the first of {mesh.ndim} axes: only tensor "
            "parallelism on one axis can be combined with sharding along a data axis"
        )
    return mesh


def _cut(name: str, param: DTensor) -> Cut | None:
    placement = param.placements[0]
    if isinstance(placement, Replicate):
        return None
    if type(placement) is not Shard:
        raise ValueError(f"{name!r} has the placement {placement}: only Shard and Replicate are supported")
    dim = placement.dim % param.ndim
    mesh = param.device_mesh
    cut = Cut(shape=tuple(param.shape), dim=dim, index=mesh.get_local_rank(), size=mesh.size())
    if tuple(param.to_local().shape) != cut.local_shape:
        raise ValueError(
            f"{name!r}: dimension {dim} of {tuple(param.shape)} is not a multiple of {mesh.size()} ranks, and this "
            f"rank has {tuple(param.to_local().shape)} of it: choose sizes that the ranks divide"
        )
    return cut


def _exchange(module: nn.Module, new: dict[int, nn.Parameter]) -> None:
    """Gives a module the new parameters, and DTensors made of them while it runs."""
    layouts: dict[str, Callable[[torch.Tensor], DTensor]] = {}
    registered: dict[str, Any] = dict(module._parameters)
    for name, param in registered.items():
        if isinstance(param, DTensor):
            layouts[name] = functools.partial(
                DTensor.from_local,
                device_mesh=param.device_mesh,
                placements=param.placements,
                run_check=False,
                shape=param.shape,
                stride=param.stride(),
            )
            module._parameters[name] = new[id(param)]
    if not layouts:
        return
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        own = {name: module._parameters[name] for name in layouts}
        try:
            for name, made in layouts.items():
                module._parameters[name] = made(own[name])  # type: ignore[assignment, arg-type]
            return inner(*args, **kwargs)
        finally:
            module._parameters.update(own)

    module.forward = forward
