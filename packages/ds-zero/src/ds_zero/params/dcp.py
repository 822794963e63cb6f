"""A sharded model and its optimizer for torch.distributed.checkpoint, at any stage and on any number of ranks.

[Note: optimizer states before the first step]
torch's load fills existing tensors, so the states of an optimizer that has not stepped must be allocated first. A step
of a copy of the optimizer over a few elements shows which states it has. They are given to the optimizer when the load
has finished. A save before the first step writes them as zeros with a step count of 0. If a load reads this count, it
drops the states, so that the first step starts as in a new optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_zero import _registry
from ds_zero.interfaces import PagesState
from ds_zero.layout.optimizer_trial import reproduce
from ds_zero.params.records import (
    Range,
    group_names,
    publish_loaded,
    ranges,
    saved_buffers,
)
from ds_zero.runtime.materialize import NUMBERS
from ds_zero.runtime.optimizer_states import MASTER_BITS, new_state
from ds_zero.state import ZeroState
from ds_zero.tensors.logical_tensor import LogicalTensor, parts

_IMPLEMENTATION = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})
"""Options of a group that say how it is computed, not what; they stay as this run has them."""


class Stateful(Protocol):
    """torch.distributed.checkpoint.stateful.Stateful, which torch's `save` and `load` call by themselves."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def dcp_state_dict(
    model: nn.Module, optimizer: Optimizer | None = None, *, bare_names: bool = False
) -> dict[str, Any]:
    """Returns a state dict for `save`, `async_save` and `load` of torch.distributed.checkpoint, for a model that
    `shard` has sharded.

    Each rank writes and reads its own elements; no rank needs memory for a whole tensor. Tensors have the names and
    shapes of `{"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}` for an ordinary
    model or an FSDP2 model, so that each of them can read the files of the others. Parameters are the fp32 masters.
    After `load`, the parameters of all ranks have the loaded values.

    Args:
        bare_names: use names without the prefix "model.", for files of `dcp.save(model.state_dict(), ...)`. Only for
            the model without its optimizer.

    Returns:
        {"model": ..., "optimizer": ...}: add keys of your own, but leave these at the top level.

    Raises:
        ValueError: the model is not sharded, the optimizer is not the one that was sharded with it, ranks hold
            different experts under one name, which torch's checkpoints cannot keep apart, or the store or the optimizer
            keeps values away; `bare_names` beside an optimizer.
    """
    state = _registry.state_of(model)
    for bucket in state.buckets:
        if bucket.ranks.part[1] > 1:
            raise ValueError(
                f"{bucket.layout.slots[0].fqn!r} has different values on sets of ranks (mesh_for), but a checkpoint of "
                "torch.distributed.checkpoint has one tensor for each name: use ds_checkpoint.save and load"
            )
        if bucket.storage.is_away(bucket.storage.exact):
            raise ValueError(
                f"{type(state.store).__name__} keeps the values of {bucket.layout.slots[0].fqn!r} away, but "
                "torch.distributed.checkpoint needs tensors in memory: use ds_checkpoint.save and load"
            )
    if bare_names:
        if optimizer is not None:
            raise ValueError("bare_names is for the model alone: pass no optimizer, or remove bare_names")
        return {**_ModelState(model).state_dict(), _PUBLISH: _Publishing(model)}
    entries: dict[str, Any] = {"model": _ModelState(model)}
    if optimizer is not None:
        if _registry.find(optimizer) is not state:
            raise ValueError(
                "the optimizer was not sharded with this model: pass the objects that ds_zero.shard returned"
            )
        if isinstance(optimizer, PagesState):
            raise ValueError(
                f"{type(optimizer).__name__} keeps its states away, but torch.distributed.checkpoint needs tensors in "
                "memory: use ds_checkpoint.save and load"
            )
        entries["optimizer"] = _OptimizerState(model, optimizer)
    return entries


class _TopLevel:
    """Raises if it is not at the top level of a state dict, where torch would pickle it."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "the result of ds_zero.dcp_state_dict has to be at the top level of the state dict: "
            "dcp.save(ds_zero.dcp_state_dict(model, optimizer), ...), or {**ds_zero.dcp_state_dict(...), 'more': ...}"
        )


class _ModelState(_TopLevel):
    """Parameters under all their names, and persistent buffers."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def state_dict(self) -> dict[str, Any]:
        """Returns views of the live values."""
        state = _registry.state_of(self._model)
        state.stepper.settle()
        state.checksums.before_save()
        written = _written(state)
        entries: dict[str, Any] = {}
        for r in ranges(state, owned=True):
            held = parts(r.slot.shape, r.start, r.values, written.get(r.fqn))
            tensor = LogicalTensor.of(r.slot.shape, r.values, held)
            entries |= dict.fromkeys(state.names[r.fqn], tensor)
        return entries | {fqn: buffer.detach() for fqn, buffer in saved_buffers(self._model).items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called after torch has filled the live values: updates the parameters of all ranks. Collective."""
        state = _registry.state_of(self._model)
        state.stepper.forget()  # gradients with respect to the replaced values, such as during an accumulation
        publish_loaded(state)


_PUBLISH = "ds_zero.publish"
"""Key of an entry that is added to bare names. It adds nothing to a file."""


class _Publishing(_ModelState):
    """An entry without tensors, whose `load_state_dict` torch calls after everything has been loaded."""

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty dict."""
        return {}


class _OptimizerState(_TopLevel):
    """{"state": {name of parameter: {name of state: value}}, "param_groups": [{"params": [names], "lr": ...}]}."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        self._made: dict[int, dict[str, Any]] = {}
        """Id of a shard -> states that a load fills; [Note: optimizer states before the first step]."""

    def state_dict(self) -> dict[str, Any]:
        """Returns views of the live states, and the options of the groups."""
        state = _registry.state_of(self._model)
        state.stepper.settle()
        self._made.clear()
        written = _written(state)
        saved = {r.fqn: self._states(r, written.get(r.fqn)) for r in self._ranges(state)}
        names = group_names(self._model, self._optimizer)
        groups = [
            {**group, "params": params}
            for group, params in zip(self._optimizer.param_groups, names, strict=True)
        ]
        return {"state": saved, "param_groups": groups}

    def _ranges(self, state: ZeroState) -> list[Range]:
        return [r for r in ranges(state, owned=True) if r.bucket.shards]

    def _states(self, r: Range, written: tuple[int, int] | None) -> dict[str, Any]:
        shard = r.bucket.shards[r.index]
        held = self._optimizer.state.get(shard) or {}
        missing = ""
        if held.keys() <= {MASTER_BITS}:
            group = next(g for g in self._optimizer.param_groups if any(p is shard for p in g["params"]))
            held = self._made[id(shard)] = {**self._new_states(r, shard, group), **held}
            if group.get("dampening"):
                missing = "the optimizer has not stepped, and its first step differs from later ones (dampening): save "
                missing += "the model alone, or after a step"
        return {
            name: _entry(r, name, value, shard, written, missing)
            for name, value in held.items()
            if value is not None
        }

    def _new_states(self, r: Range, shard: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """States as one step would make them, empty."""
        shape = r.slot.shape if r.bucket.layout.undivided else (8,)
        param = nn.Parameter(torch.ones(shape))
        param.grad = torch.ones(shape)
        groups: list[list[Any]] = [[param] if g is group else [] for g in self._optimizer.param_groups]
        trial = reproduce(self._optimizer, groups)
        with torch.enable_grad():
            trial.step()
        made: dict[str, Any] = {}
        for name, value in trial.state[param].items():
            if not isinstance(value, Tensor):
                made[name] = type(value)(0) if isinstance(value, (int, float)) else value
            elif value.shape == param.shape and name not in NUMBERS:
                made[name] = new_state(self._optimizer, shard, name, value.dtype)
            else:
                made[name] = torch.zeros_like(value, device=shard.device if value.ndim else None)
        return made

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The live states have been filled: put in place what is new.

        Raises:
            ValueError: the groups of the checkpoint have other parameters.
        """
        state = _registry.state_of(self._model)
        own = group_names(self._model, self._optimizer)
        for index, (group, names) in enumerate(zip(state_dict["param_groups"], own, strict=True)):
            if list(group["params"]) != names:
                stored = list(group["params"])
                raise ValueError(
                    f"group {index} of the optimizer has {len(names)} parameters, first {names[:3]}, and that of the "
                    f"checkpoint {len(stored)}, first {stored[:3]}: make the same groups in the same order. The "
                    "optimizer's states are partly loaded now"
                )
        for r in self._ranges(state):
            shard = r.bucket.shards[r.index]
            made = self._made.pop(id(shard), None)
            if made is not None:
                self._optimizer.state[shard] = made
            _take_numbers(self._optimizer, shard, state_dict["state"].get(r.fqn, {}))
        for group, loaded in zip(self._optimizer.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in loaded.items() if key not in _IMPLEMENTATION})
        state.checksums.loaded()


def _take_numbers(optimizer: Optimizer, shard: Tensor, loaded: Mapping[str, Any]) -> None:
    """Sets the states of one parameter that are numbers. Drops all of its states if their step count is 0, [Note:
    optimizer states before the first step].
    """
    held = optimizer.state.get(shard)
    if held is None:
        return
    for name, value in loaded.items():
        if isinstance(held.get(name), (int, float)):
            held[name] = type(held[name])(value.item())
    step = held.get("step")
    if step is not None and float(step) == 0:
        for name in held.keys() - {MASTER_BITS}:
            del held[name]
        if not held:
            del optimizer.state[shard]


def _entry(
    r: Range, name: str, value: Any, shard: Tensor, written: tuple[int, int] | None, missing: str
) -> Any:
    """Returns one optimizer state in a form that torch's planner accepts."""
    if isinstance(value, (int, float)):
        return torch.tensor(value, dtype=torch.float64)
    if not isinstance(value, Tensor):
        raise ValueError(
            f"optimizer state {name!r} of parameter {r.fqn!r} is a {type(value).__name__}: a checkpoint can contain "
            "only tensors and numbers"
        )
    if value.shape == shard.shape and name not in NUMBERS:
        begin = r.start - r.shard_start
        own = value.detach().view(-1)[begin : begin + r.values.numel()]
        return LogicalTensor.of(r.slot.shape, own, parts(r.slot.shape, r.start, own, written), missing)
    if value.ndim == 0:
        return value.detach()
    if r.bucket.layout.undivided:  # another shape than the parameter, as of Adafactor
        whole = (0, value.numel()) if written is not None else None
        return LogicalTensor.of(value.shape, value, parts(value.shape, 0, value.detach().view(-1), whole))
    raise ValueError(
        f"optimizer state {name!r} of parameter {r.fqn!r} has shape {tuple(value.shape)}, but the shard has shape "
        f"{tuple(shard.shape)}: it is neither element-wise nor a number, so it cannot be saved by range"
    )


def _written(state: ZeroState) -> dict[str, tuple[int, int]]:
    """Returns name of a parameter -> the range that this rank writes. The ranks together write each element once."""
    return {r.fqn: (r.start, r.start + r.values.numel()) for r in ranges(state, owned=False)}
