"""What the fused optimizers share: states, batches of equal step, and torch's optimizer surface."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from ds_core import arena

Group = dict[str, Any]

ARENA_BYTES = 1 << 20
"""CPU states from this size on live in the arena: smaller ones gain nothing from huge pages."""


@dataclass
class Batch:
    """Tensors of one group that share device and step: the arguments of one kernel call. 1-D or contiguous."""

    step: int
    """Of this update, counted from 1."""
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: dict[str, list[Tensor]] = field(default_factory=dict)
    """One list per name of a state."""
    out: list[Tensor | None] = field(default_factory=list)

    def outs(self) -> list[Tensor | None] | None:
        """`out`, or None where no tensor wants a copy."""
        return self.out if any(o is not None for o in self.out) else None


class FusedOptimizer(Optimizer):
    """Base of the fused optimizers.

    Parameters are fp32; gradients (`p.grad`) fp32. Parameters without gradient or without elements are skipped.
    States carry torch's names; "step" is a 0-dim fp32 CPU tensor.
    """

    state_names: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        if state_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"state_dtype must be torch.float32 or torch.bfloat16, but is {state_dtype}")
        self._state_dtype = state_dtype
        super().__init__(params, defaults)

    # -- what a subclass adds

    @abstractmethod
    def _apply(self, group: Group, batch: Batch, grad_scale: float) -> None:
        """Calls the kernel with the group's options. `grad_scale` is negative where the group maximizes."""

    def _new_state(self, param: Tensor) -> Tensor:
        """A zeroed state for `param`, in its memory order. Override it to place states elsewhere."""
        if param.device.type == "cpu" and param.numel() * self._state_dtype.itemsize >= ARENA_BYTES:
            return arena.zeros(param.numel(), self._state_dtype).as_strided(param.size(), param.stride())
        return torch.zeros_like(param, dtype=self._state_dtype)

    # -- stepping

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Steps every parameter that has a gradient. `closure` re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                params: list[Tensor] = group["params"]
                self._step_group(group, params, [None] * len(params), 1.0)
        return loss

    @torch.no_grad()
    def step_fused(
        self, params: Sequence[Tensor], *, grad_scale: Tensor, out: Sequence[Tensor | None]
    ) -> None:
        """Steps exactly `params`, any subset of this optimizer's parameters, reading `p.grad`.

        One pass over memory: each gradient is multiplied by `grad_scale` (0-dim), the parameter is updated, and
        `out[i]`, where not None, receives `params[i]` rounded to its dtype. No step hooks run.
        """
        if len(out) != len(params):
            raise ValueError(f"step_fused: out has {len(out)} entries, but params has {len(params)}")
        owner = {id(p): index for index, group in enumerate(self.param_groups) for p in group["params"]}
        by_group: dict[int, tuple[list[Tensor], list[Tensor | None]]] = {}
        for i, (param, copy) in enumerate(zip(params, out, strict=True)):
            if id(param) not in owner:
                raise ValueError(f"step_fused: params[{i}] is in no parameter group of this optimizer")
            members = by_group.setdefault(owner[id(param)], ([], []))
            members[0].append(param)
            members[1].append(copy)
        scale = float(grad_scale)
        for index, (group_params, group_out) in by_group.items():
            self._step_group(self.param_groups[index], group_params, group_out, scale)

    def _step_group(
        self, group: Group, params: Sequence[Tensor], out: Sequence[Tensor | None], grad_scale: float
    ) -> None:
        batches: dict[tuple[torch.device, int], Batch] = {}
        steps: list[Tensor] = []
        names = self._names(group)
        for param, copy in zip(params, out, strict=True):
            grad = param.grad
            if grad is None or param.numel() == 0:
                continue
            state, step = self._prepare(param, group)
            if "step" in state:
                steps.append(state["step"])
            batch = batches.get((param.device, step))
            if batch is None:
                batch = batches[param.device, step] = Batch(step, states={name: [] for name in names})
            batch.out.append(copy)
            if param.is_contiguous() and grad.is_contiguous():  # states are as the parameter; kernels check
                batch.params.append(param)
                batch.grads.append(grad)
                for name in names:
                    batch.states[name].append(state[name])
            else:
                batch.params.append(_in_memory_order(param))
                batch.grads.append(_like(grad, param))
                for name in names:
                    batch.states[name].append(_in_memory_order(state[name]))
        for batch in batches.values():
            self._apply(group, batch, -grad_scale if group.get("maximize", False) else grad_scale)
        for count in steps:  # after the kernels: a refused batch leaves the counters as they were
            count.add_(1.0)

    def _names(self, group: Group) -> tuple[str, ...]:
        """The states that the group's options need, of `state_names`."""
        return self.state_names

    def _prepare(self, param: Tensor, group: Group) -> tuple[dict[str, Any], int]:
        """The parameter's state, made on first use, and the number of this update, counted from 1."""
        state = cast(dict[str, Any], self.state[param])
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in self._names(group):
                state[name] = self._new_state(param)
        return state, int(state["step"].item()) + 1

    # -- torch's surface. [Note: no dynamo] torch wraps these four so that their first call imports torch._dynamo,
    # which costs seconds and some hundred MB. They compile nothing, so the functions inside the wrappers are called.

    def add_param_group(self, param_group: Group) -> None:
        """As `torch.optim.Optimizer.add_param_group`."""
        _unwrapped(Optimizer.add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `torch.optim.Optimizer.zero_grad`."""
        _unwrapped(Optimizer.zero_grad)(self, set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`."""
        return cast(dict[str, Any], _unwrapped(Optimizer.state_dict)(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`. States are copied into tensors of this optimizer's own."""
        _unwrapped(Optimizer.load_state_dict)(self, state_dict)
        for param, state in self.state.items():
            for name in self.state_names:
                if (loaded := state.get(name)) is not None:
                    state[name] = self._new_state(param).copy_(loaded)
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device="cpu").clone()
        self._check_groups()

    def _check_groups(self) -> None:
        """Raises ValueError where loaded groups ask for what the kernel does not do."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_state_dtype": self._state_dtype}


def check_not_negative(**options: float) -> None:
    """Raises ValueError naming the first option below 0 (or NaN)."""
    for name, value in options.items():
        if not value >= 0.0:
            raise ValueError(f"{name} must not be negative, but is {value}")


def check_betas(betas: tuple[float, float]) -> None:
    """Raises ValueError unless both lie in [0, 1)."""
    if not (0.0 <= betas[0] < 1.0 and 0.0 <= betas[1] < 1.0):
        raise ValueError(f"betas must lie in [0, 1), but are {betas}")


def _unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    return cast(Callable[..., Any], getattr(function, "__wrapped__", function))


def _in_memory_order(tensor: Tensor) -> Tensor:
    """A contiguous view of the same memory: element-wise kernels need no more of e.g. a channels_last tensor."""
    if tensor.is_contiguous():
        return tensor
    if not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        raise ValueError(
            f"the fused optimizers need parameters without gaps in memory, but one of shape {tuple(tensor.shape)} "
            f"has strides {tensor.stride()}; use parameter.data = parameter.data.contiguous() before training"
        )
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def _like(grad: Tensor, param: Tensor) -> Tensor:
    """The gradient, its elements in the parameter's memory order."""
    if grad.is_sparse:
        raise ValueError(
            "the fused optimizers take no sparse gradients; use sparse=False or torch.optim.SparseAdam"
        )
    if grad.stride() != param.stride():
        grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
    return _in_memory_order(grad)
