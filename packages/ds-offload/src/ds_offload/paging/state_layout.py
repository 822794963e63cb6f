"""What states an optimizer keeps of each element."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_NUMEL = 3  # of the trial parameter: no number and no factor of a matrix has this shape
_MATRIX = (5, 7)  # the shape of the trial parameter of an optimizer of whole matrices


def needs_whole(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether an optimizer must see the tensors of a group whole: matrices (Muon), or tensors whose norms it uses
    (LAMB).
    """
    asked: Any = getattr(optimizer, "needs_whole", None)
    return bool(asked(group)) if asked is not None else hasattr(optimizer, "segment_sums")


@dataclass(frozen=True)
class StateLayout:
    """The element-wise states that an optimizer keeps for the parameters of one group."""

    dtypes: Mapping[str, torch.dtype]
    """Name of each element-wise state -> its dtype. Other states are numbers, and stay in memory."""


def over(optimizer: Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    """Returns an optimizer of the same class and options with `groups`, without states and hooks."""
    made: Optimizer = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        made.__dict__[name] = OrderedDict() if isinstance(value, OrderedDict) else value
    made.state = defaultdict(dict)
    made.param_groups = groups
    return made


def probe_whole(optimizer: Optimizer, group: Mapping[str, Any], param: Tensor) -> StateLayout:
    """Determines the states of an optimizer of whole tensors by one step of a small tensor with as many dims as
    `param`, at most two.

    Raises:
        ValueError: the optimizer cannot step it.
    """
    shape = _MATRIX if param.ndim > 1 else _MATRIX[:1]
    value = torch.ones(shape, dtype=param.dtype, device=param.device).requires_grad_()
    value.grad = torch.ones_like(value)
    trial = over(optimizer, [{**group, "params": [value]}])
    trial.step()
    return StateLayout(
        {
            key: state.dtype
            for key, state in trial.state[value].items()
            if isinstance(state, Tensor) and state.shape == shape
        }
    )


def probe(optimizer: Optimizer, group: Mapping[str, Any], param: Tensor) -> StateLayout:
    """Determines the states by one step of a small parameter like `param`, under the options of `group`.

    Raises:
        ValueError: the optimizer is not element-wise.
    """
    name = type(optimizer).__name__
    generator = torch.Generator().manual_seed(0)
    values, grads = torch.randn(2, _NUMEL, generator=generator)

    def stepped(cut: int) -> tuple[Tensor, list[Any]]:
        parts = [
            (v.to(param.device, param.dtype, copy=True), g.to(param.device, param.dtype))
            for v, g in zip((values[:cut], values[cut:]), (grads[:cut], grads[cut:]), strict=True)
            if v.numel()
        ]
        params = [value.requires_grad_() for value, _ in parts]
        for value, grad in parts:
            value.grad = grad
        trial = over(optimizer, [{**group, "params": params}])
        try:
            trial.step()
        except KeyError:  # its states are made by the constructor, as those of torch's Adagrad
            trial = type(optimizer)(params, **optimizer.defaults)
            trial.param_groups[0].update({key: value for key, value in group.items() if key != "params"})
            trial.step()
        results = [value.detach() for value, _ in parts]
        return torch.cat(results).float().cpu(), [trial.state[value] for value, _ in parts]

    try:
        whole, states = stepped(_NUMEL)
        split, _ = stepped(1)
    except Exception as error:
        raise ValueError(
            f"PagedOptimizer: {name} cannot step a 1-D part of a parameter ({type(error).__name__}: {error}), so its "
            "states cannot be paged: use an element-wise optimizer such as CPUAdam"
        ) from error
    if not torch.allclose(whole, split, rtol=1e-6, atol=1e-7):
        raise ValueError(
            f"PagedOptimizer: {name} gives another result if a parameter is split in two, so its states cannot be "
            "paged: use an element-wise optimizer such as CPUAdam"
        )
    dtypes = {
        key: value.dtype
        for key, value in states[0].items()
        if isinstance(value, Tensor) and value.shape == (_NUMEL,)
    }
    return StateLayout(dtypes)
