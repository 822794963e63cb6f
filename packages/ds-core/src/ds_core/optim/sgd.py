"""SGD with momentum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ds_core import kernels
from ds_core.optim.base import Batch, FusedOptimizer, Group, check_not_negative


class FusedSGD(FusedOptimizer):
    """SGD with momentum, with the options and the `state_dict` format of `torch.optim.SGD`.

    The only state is "momentum_buffer"; there is none if `momentum` is 0.
    """

    state_names: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        check_not_negative(lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and (momentum <= 0.0 or dampening != 0.0):
            raise ValueError(
                f"nesterov needs momentum > 0 and dampening 0, but they are {momentum} and {dampening}"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults, state_dtype)

    def _names(self, group: Group) -> tuple[str, ...]:
        return self.state_names if group["momentum"] != 0.0 else ()

    def _prepare(self, param: Tensor, group: Group) -> tuple[dict[str, Any], int | None]:
        if not self._names(group):
            return {}, 2  # no state, and no entry in `state`, as in torch
        state: dict[str, Any] = self.state[param]
        if state.get("momentum_buffer") is not None:
            return state, 2
        with torch.no_grad():
            state["momentum_buffer"] = self.new_named_state(param, "momentum_buffer")
        return state, 1

    def _apply(self, group: Group, batch: Batch, grad_scale: float) -> None:
        kernels.sgd_step(
            batch.params,
            batch.states.get("momentum_buffer"),
            batch.grads,
            first=batch.step == 1,
            lr=float(group["lr"]),
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            grad_scale=grad_scale,
            out=batch.outs(),
            checksums=batch.checksums,
            formats=batch.formats,
        )
