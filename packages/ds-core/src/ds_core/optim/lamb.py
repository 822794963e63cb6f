"""LAMB."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ds_core import kernels
from ds_core.optim import counters
from ds_core.optim.base import Batch, FusedOptimizer, Group, check_betas, check_not_negative


class FusedLamb(FusedOptimizer):
    """LAMB (You et al. 2020): Adam's update direction, scaled for each parameter to the norm of that parameter.

    The trust ratio |p| / |u| is clamped to [`min_ratio`, `max_ratio`]; the defaults do not clamp, as in the paper.
    `step` needs whole parameters. If they are sharded, call the two halves `segment_sums` and `step_segments`, and
    sum over ranks in between. `bias_correction=False` does not correct the moments.
    """

    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    checksums_in_pass: ClassVar[bool] = False

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
        bias_correction: bool = True,
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
        super().__init__(params, defaults, state_dtype, bias_correction=bias_correction)

    @torch.no_grad()
    def segment_sums(self, params: Sequence[Tensor], *, grad_scale: Tensor) -> Tensor:
        """First half of a step: updates the moments of `params`, any subset of this optimizer's parameters.

        Returns:
            An fp64 CPU tensor of shape (len(params), 2): sums of squares of each parameter and of its direction;
            zeros for a parameter without a gradient.
        """
        sums = torch.zeros(len(params), 2, dtype=torch.float64)
        scale = float(grad_scale)
        for index, places in self._by_group(params).items():
            group, members = self.param_groups[index], [params[i] for i in places]
            beta1, beta2 = group["betas"]
            for batch in self._batches(group, members, None)[0]:
                sums[[places[row] for row in batch.rows]] = kernels.lamb_moments(
                    batch.params,
                    batch.states["exp_avg"],
                    batch.states["exp_avg_sq"],
                    batch.grads,
                    step=self._corrected_step(batch),
                    beta1=float(beta1),
                    beta2=float(beta2),
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    grad_scale=-scale if group["maximize"] else scale,
                )
        return sums

    @torch.no_grad()
    def step_segments(self, params: Sequence[Tensor], sums: Tensor, *, out: Sequence[Tensor | None]) -> None:
        """Second half of a step: updates `params` by their directions, scaled by the trust ratios computed from
        `sums`. `out[i]`, unless None, receives a copy.
        """
        for index, places in self._by_group(params).items():
            group, members = self.param_groups[index], [params[i] for i in places]
            beta1, beta2 = group["betas"]
            batches, counts = self._batches(group, members, [out[i] for i in places])
            for batch in batches:
                mine = sums[[places[row] for row in batch.rows]]
                kernels.lamb_apply(
                    batch.params,
                    batch.states["exp_avg"],
                    batch.states["exp_avg_sq"],
                    kernels.trust_ratios(mine, group["min_ratio"], group["max_ratio"]),
                    step=self._corrected_step(batch),
                    lr=float(group["lr"]),
                    beta1=float(beta1),
                    beta2=float(beta2),
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    out=batch.outs(),
                )
            counters.advance(counts)

    def _apply(self, group: Group, batch: Batch, grad_scale: float) -> None:
        beta1, beta2 = group["betas"]
        kernels.lamb_step(
            batch.params,
            batch.states["exp_avg"],
            batch.states["exp_avg_sq"],
            batch.grads,
            step=self._corrected_step(batch),
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
