"""`deepspeed.utils.safe_get_*` and `safe_set_*`: parameters, gradients and states of a sharded model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import ds_zero
from ds_zero import get_full, get_local, set_full, set_local, update_full_grads


def _known(param: nn.Parameter) -> bool:
    """Whether there is anything to give: None is the answer for ordinary parameters."""
    return ds_zero.presence(param) is not None


def safe_get_full_fp32_param(param: nn.Parameter) -> Tensor | None:
    """The fp32 master, whole. Collective."""
    return get_full(None, param, "param") if _known(param) else None


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
    return get_local(None, param, "param") if _known(param) else None


def safe_get_local_grad(param: nn.Parameter) -> Tensor | None:
    return get_local(None, param, "grad") if _known(param) else None


def safe_get_local_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    return get_local(None, param, optim_state_key) if _known(param) else None


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
