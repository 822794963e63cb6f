"""`deepspeed.utils.safe_get_*` and `safe_set_*`: parameters, gradients and states of a sharded model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import ds_zero
from ds_zero import get_full, get_local, set_full, set_local, update_full_grads


def _known(param: nn.Parameter) -> bool:
    """Whether there is anything to give: None is the answer for ordinary parameters."""
    return ds_zero.presence(param) is not None


def _own(param: nn.Parameter, kind: str) -> Tensor | None:
    """This rank's slice, 1-D; of size 0 where it owns nothing of a parameter that is trained."""
    found = ds_zero.presence(param)
    if found is None or not param.requires_grad:
        return None
    value = get_local(None, param, kind)
    return torch.zeros(0) if value is None and found.own is not None and not found.own.numel() else value


def safe_get_full_fp32_param(param: nn.Parameter) -> Tensor | None:
    """The fp32 master, whole; None for a frozen parameter, which has none. Collective."""
    return get_full(None, param, "param") if _known(param) and param.requires_grad else None


def safe_get_full_grad(param: nn.Parameter) -> Tensor | None:
    """What has accumulated, averaged over ranks, whole. Collective."""
    return get_full(None, param, "grad") if _known(param) else param.grad


def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """A state, whole. Collective."""
    return get_full(None, param, optim_state_key) if _known(param) else None


def safe_set_full_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Rank 0's value becomes the parameter's. Collective."""
    set_full(None, param, "param", value)


def safe_set_full_grad(param: nn.Parameter, value: Tensor) -> None:
    """Rank 0's value takes the place of what has accumulated. Collective."""
    set_full(None, param, "grad", value)


def safe_set_full_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Rank 0's value becomes the state. Collective."""
    set_full(None, param, optim_state_key, value)


def safe_get_local_fp32_param(param: nn.Parameter) -> Tensor | None:
    """This rank's slice of the master, 1-D."""
    return _own(param, "param")


def safe_get_local_grad(param: nn.Parameter) -> Tensor | None:
    return _own(param, "grad")


def safe_get_local_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    return _own(param, optim_state_key)


def safe_set_local_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Replace this rank's slice; every rank calls it with its own."""
    set_local(None, param, "param", value)


def safe_set_local_grad(param: nn.Parameter, value: Tensor) -> None:
    set_local(None, param, "grad", value)


def safe_set_local_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    set_local(None, param, optim_state_key, value)


def safe_update_full_grad_vectorized(
    param_list: list[nn.Parameter], update_func: Callable[[Tensor, nn.Parameter], Any]
) -> None:
    """`update_func(grad, param)` on whole gradients, on every rank. Collective."""
    update_full_grads(None, param_list, update_func)
