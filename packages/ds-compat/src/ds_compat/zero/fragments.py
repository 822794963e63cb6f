"""`deepspeed.utils.safe_get_*` and `safe_set_*`: parameters, gradients and states of a sharded model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import ds_zero
from ds_zero import get_full, get_local, set_full, set_local, update_full_grads


def _known(param: nn.Parameter) -> bool:
    """Whether the parameter is sharded; for ordinary parameters the functions return None."""
    return ds_zero.presence(param) is not None


def _own(param: nn.Parameter, kind: str) -> Tensor | None:
    """Returns this rank's 1-D slice; empty if it owns no element of a trained parameter."""
    status = ds_zero.presence(param)
    if status is None or not param.requires_grad:
        return None
    value = get_local(None, param, kind)
    return torch.zeros(0) if value is None and status.own is not None and not status.own.numel() else value


def safe_get_full_fp32_param(param: nn.Parameter) -> Tensor | None:
    """Returns the whole fp32 master; None for a frozen parameter, which has none. Collective."""
    return get_full(None, param, "param") if _known(param) and param.requires_grad else None


def safe_get_full_grad(param: nn.Parameter) -> Tensor | None:
    """Returns the whole accumulated gradient, averaged over ranks. Collective."""
    return get_full(None, param, "grad") if _known(param) else param.grad


def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """Returns a whole optimizer state. Collective."""
    return get_full(None, param, optim_state_key) if _known(param) else None


def safe_set_full_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Sets the parameter to rank 0's value. Collective."""
    set_full(None, param, "param", value)


def safe_set_full_grad(param: nn.Parameter, value: Tensor) -> None:
    """Replaces the accumulated gradient by rank 0's value. Collective."""
    set_full(None, param, "grad", value)


def safe_set_full_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Sets an optimizer state to rank 0's value. Collective."""
    set_full(None, param, optim_state_key, value)


def safe_get_local_fp32_param(param: nn.Parameter) -> Tensor | None:
    """Returns this rank's 1-D slice of the master."""
    return _own(param, "param")


def safe_get_local_grad(param: nn.Parameter) -> Tensor | None:
    return _own(param, "grad")


def safe_get_local_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    return _own(param, optim_state_key)


def safe_set_local_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Replaces this rank's slice; all ranks must call it, each with its own slice."""
    set_local(None, param, "param", value)


def safe_set_local_grad(param: nn.Parameter, value: Tensor) -> None:
    set_local(None, param, "grad", value)


def safe_set_local_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    set_local(None, param, optim_state_key, value)


def safe_update_full_grad_vectorized(
    param_list: list[nn.Parameter], update_func: Callable[[Tensor, nn.Parameter], Any]
) -> None:
    """Replaces whole gradients by `update_func(grad, param)`, on every rank. Collective."""
    update_full_grads(None, param_list, update_func)
