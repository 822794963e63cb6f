"""Adagrad."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ds_core import kernels
from ds_core.optim.base import Batch, FusedOptimizer, Group, check_not_negative


class FusedAdagrad(FusedOptimizer):
    """Adagrad (Duchi, Hazan and Singer 2011), with the options and the `state_dict` format of `torch.optim.Adagrad`."""

    state_names: ClassVar[tuple[str, ...]] = ("sum",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        check_not_negative(
            lr=lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
        )
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "maximize": maximize,
        }
        super().__init__(params, defaults, state_dtype)

    def _prepare(self, param: Tensor, group: Group) -> tuple[dict[str, Any], int | None]:
        fresh = not self.state[param]
        state, step = super()._prepare(param, group)
        if fresh:
            state["sum"].fill_(group["initial_accumulator_value"])
        return state, step

    def _apply(self, group: Group, batch: Batch, grad_scale: float) -> None:
        kernels.adagrad_step(
            batch.params,
            batch.states["sum"],
            batch.grads,
            step=batch.step,
            lr=float(group["lr"]),
            lr_decay=group["lr_decay"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            grad_scale=grad_scale,
            out=batch.outs(),
            checksums=batch.checksums,
            formats=batch.formats,
        )
