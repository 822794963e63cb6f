"""LAMB."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from ds_core import kernels
from ds_core.optim.base import Batch, FusedOptimizer, Group, check_betas, check_not_negative


class FusedLamb(FusedOptimizer):
    """LAMB (You et al. 2020): Adam's direction, scaled per parameter to the parameter's own norm.

    The trust ratio |p| / |u| is kept in [`min_ratio`, `max_ratio`]; the defaults leave it as the paper has it. Not an
    element-wise optimizer: a parameter must be whole, not a shard.
    """

    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        min_ratio: float = 0.0,
        max_ratio: float = math.inf,
        maximize: bool = False,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        check_not_negative(lr=lr, eps=eps, weight_decay=weight_decay, min_ratio=min_ratio)
        check_betas(betas)
        if not min_ratio <= max_ratio:
            raise ValueError(f"min_ratio must not exceed max_ratio, but they are {min_ratio} and {max_ratio}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "min_ratio": min_ratio,
            "max_ratio": max_ratio,
            "maximize": maximize,
        }
        super().__init__(params, defaults, state_dtype)

    def _apply(self, group: Group, batch: Batch, grad_scale: float) -> None:
        beta1, beta2 = group["betas"]
        kernels.lamb_step(
            batch.params,
            batch.states["exp_avg"],
            batch.states["exp_avg_sq"],
            batch.grads,
            step=batch.step,
            lr=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            min_ratio=group["min_ratio"],
            max_ratio=group["max_ratio"],
            grad_scale=grad_scale,
            out=batch.outs(),
        )
