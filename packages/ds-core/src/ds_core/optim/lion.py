"""Lion."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from ds_core import kernels
from ds_core.optim.base import Batch, FusedOptimizer, Group, check_betas, check_not_negative


class FusedLion(FusedOptimizer):
    """Lion (Chen et al. 2023): the sign of an interpolated momentum, weight decay decoupled.

    One state per parameter. Use a learning rate 3 to 10 times smaller than AdamW's, and a weight decay as much larger.
    """

    state_names: ClassVar[tuple[str, ...]] = ("exp_avg",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        check_not_negative(lr=lr, weight_decay=weight_decay)
        check_betas(betas)
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, state_dtype)

    def _apply(self, group: Group, batch: Batch, grad_scale: float) -> None:
        beta1, beta2 = group["betas"]
        kernels.lion_step(
            batch.params,
            batch.states["exp_avg"],
            batch.grads,
            lr=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            weight_decay=group["weight_decay"],
            grad_scale=grad_scale,
            out=batch.outs(),
            checksums=batch.checksums,
            formats=batch.formats,
        )
