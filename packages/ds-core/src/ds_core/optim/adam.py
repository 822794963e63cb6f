"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from ds_core import kernels
from ds_core.formats import StepFormats
from ds_core.optim.base import Batch, FusedOptimizer, Group, check_betas, check_not_negative


class FusedAdam(FusedOptimizer):
    """AdamW (Loshchilov and Hutter 2019), or Adam with L2 regularisation where `decoupled` is False.

    One pass over memory for all tensors. Agrees with `torch.optim.AdamW` within a few units in the last place per
    step and shares its `state_dict` format in both directions. `state_dtype=torch.bfloat16` halves the states.
    `bias_correction=False` does not correct the moments, like BERT's first AdamW: early steps are scaled by (1 -
    beta1^t) / sqrt(1 - beta2^t). `copies_away=True`, on the CPU: the bf16 copies that `step_fused` writes round ties
    away from zero, so that training has the bits of ds-offload's split masters.
    """

    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled: bool = True,
        maximize: bool = False,
        bias_correction: bool = True,
        state_dtype: torch.dtype = torch.float32,
        copies_away: bool = False,
    ) -> None:
        check_not_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        self._copies_away = copies_away
        check_betas(betas)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": False,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled,
        }
        super().__init__(params, defaults, state_dtype, bias_correction=bias_correction)

    def _apply(self, group: Group, batch: Batch, grad_scale: float) -> None:
        step = self._corrected_step(batch)
        apply_adam(group, batch, grad_scale, decoupled=group["decoupled_weight_decay"], step=step)

    def _formats(self, batch: Batch) -> StepFormats | None:
        return StepFormats(copies_away=True) if self._copies_away else None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_copies_away": self._copies_away}

    def _check_groups(self) -> None:
        if any(group.get("amsgrad", False) for group in self.param_groups):
            raise ValueError("FusedAdam has no amsgrad, but the loaded state was made with amsgrad=True")


def apply_adam(
    group: Group, batch: Batch, grad_scale: float, *, decoupled: bool, step: int | None = None
) -> None:
    """One step of Adam, or AdamW where the weight decay is `decoupled`, over the tensors of `batch`.

    Args:
        step: the step t of the bias correction. Default: the step of `batch`.
    """
    beta1, beta2 = group["betas"]
    kernels.adam_step(
        batch.params,
        batch.states["exp_avg"],
        batch.states["exp_avg_sq"],
        batch.grads,
        step=batch.step if step is None else step,
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        decoupled=decoupled,
        grad_scale=grad_scale,
        out=batch.outs(),
        checksums=batch.checksums,
        formats=batch.formats,
    )
