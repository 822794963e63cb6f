"""1-bit LAMB."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ds_comm.optim.adam_parts import bias_corrections, floor_variance, quotient
from ds_comm.optim.base import Entry, SelfReducingOptimizer
from ds_comm.optim.lamb_parts import averaged_ratio, kernel_options, lamb_defaults, limited_factor
from ds_comm.optim.options import CompressionOptions, adam_defaults, check_peer_arguments
from ds_core import kernels


class OneBitLamb(SelfReducingOptimizer):
    """1-bit LAMB (Li, Awan, Tang, Rajbhandari, He 2021, arXiv 2104.06069, algorithm 1).

    For `freeze_step` updates: LAMB over gradients that are reduced at full precision, with a moving average of each
    tensor's trust ratio. Then variances and averages are frozen, the momentum is averaged with one bit an element, and
    the frozen ratio is multiplied by a factor that follows how the variance would have changed. Equations:
    docs/notes/onebit.md.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        freeze_step: int = 100_000,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        coeff_beta: float = 0.9,
        factor_max: float = 4.0,
        factor_min: float = 0.5,
        factor_threshold: float = 0.1,
        max_grad_norm: float = 0.0,
        bias_correction: bool = True,
        group: dist.ProcessGroup | None = None,
        compression: CompressionOptions | None = None,
        **peer: Any,
    ) -> None:
        """Args:
        params: as for every optimizer of torch; fp32, bf16 or fp16.
        lr: learning rate.
        betas: of momentum and variance.
        eps: added to the root of the variance.
        weight_decay: decoupled, within the trust ratio.
        freeze_step: updates at full precision.
        max_coeff: largest trust ratio.
        min_coeff: smallest trust ratio.
        coeff_beta: of the moving average of trust ratios.
        factor_max: largest factor of the frozen ratio.
        factor_min: smallest factor of the frozen ratio.
        factor_threshold: largest relative change of the factor in one update.
        max_grad_norm: as for `OneBitAdam`.
        bias_correction: False: as in the paper.
        group: the ranks that train replicas; None: all.
        compression: None: the defaults.
        **peer: arguments of DeepSpeed's optimizer without effect here, as for `OneBitAdam`.
        """
        check_peer_arguments("OneBitLamb", peer)
        defaults = adam_defaults(lr, betas, eps, weight_decay, bias_correction)
        defaults |= lamb_defaults(
            max_coeff=max_coeff,
            min_coeff=min_coeff,
            coeff_beta=coeff_beta,
            factor_max=factor_max,
            factor_min=factor_min,
            factor_threshold=factor_threshold,
        )
        super().__init__(
            params,
            defaults,
            freeze_step=freeze_step,
            max_grad_norm=max_grad_norm,
            group=group,
            compression=compression,
        )

    def _dense_step(self, entries: Sequence[Entry], sums: Sequence[Tensor], factor: float) -> None:
        for entry, total in zip(entries, sums, strict=True):
            group, state = entry.group, entry.state
            values = entry.values.contiguous()
            moments = ([values], [state["exp_avg"]], [state["exp_avg_sq"]])
            options = kernel_options(group, entry.step + 1)
            norms = kernels.lamb_moments(*moments, [total], grad_scale=factor, **options)
            ratio = kernels.trust_ratios(norms, group["min_coeff"], group["max_coeff"])[0]
            kernels.lamb_apply(*moments, [ratio], lr=float(group["lr"]), **options)
            if values.data_ptr() != entry.values.data_ptr():
                entry.values.copy_(values)  # the parameter has another memory format
            average = averaged_ratio(group, state.get("coeff"), ratio)
            if average is not None:
                state["coeff"] = average
            if entry.step + 1 >= self.freeze_step:
                floor_variance(state["exp_avg_sq"], self.compression)
                state["fresh"] = state["exp_avg_sq"].clone()

    def _compressed_step(self, entries: Sequence[Entry], factor: float) -> None:
        compressed = self.compressed_state
        momenta = compressed.update([e.param for e in entries], [e.state["exp_avg"] for e in entries])
        assert compressed.reduce is not None and compressed.buffer is not None
        before = compressed.buffer.clone()
        for entry, momentum in zip(entries, momenta, strict=True):
            entry.state["exp_avg"] = momentum
            beta1 = float(entry.group["betas"][0])
            momentum.mul_(beta1)
            if entry.grad is not None:
                momentum.add_(entry.grad, alpha=(1.0 - beta1) * factor)
        compressed.reduce(compressed.buffer)
        for entry, momentum, old in zip(entries, momenta, compressed.views(before), strict=True):
            self._apply(entry, momentum, old)

    def _apply(self, entry: Entry, momentum: Tensor, before: Tensor) -> None:
        group, state, values = entry.group, entry.state, entry.values
        beta1, beta2 = (float(beta) for beta in group["betas"])
        if "fresh" not in state:  # loaded from another optimizer
            state["fresh"] = state["exp_avg_sq"].clone()
        grad = before.mul_(-beta1).add_(momentum).div_(1.0 - beta1)
        state["fresh"].mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        bias1, bias2 = bias_corrections(group, entry.step + 1, self.freeze_step)
        direction = quotient(momentum, state["exp_avg_sq"], group["eps"], bias2).div_(bias1)
        change = direction
        if group["weight_decay"] != 0.0:
            change = direction + group["weight_decay"] * values
        factor = self._factor(entry, direction, change)
        state["factor"] = factor
        values.add_(change, alpha=-float(group["lr"]) * state.get("coeff", 1.0) * factor)

    @staticmethod
    def _factor(entry: Entry, direction: Tensor, change: Tensor) -> float:
        """How much larger the update would be if the variance had not been frozen, within the group's limits."""
        group, state = entry.group, entry.state
        if direction.numel() == 0:
            return 1.0
        frozen = state["exp_avg_sq"].sqrt().add_(group["eps"])
        factor = float((frozen / state["fresh"].sqrt().add_(group["eps"])).max())
        whole = float(change.norm()) if change is not direction else 0.0  # 0: the share is 1
        own = float(direction.norm()) if change is not direction else 0.0
        return limited_factor(group, float(state.get("factor", 1.0)), factor, own, whole)
