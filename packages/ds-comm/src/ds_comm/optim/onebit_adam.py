"""1-bit Adam."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ds_comm.optim.adam_parts import bias_corrections, dense_adam, floor_variance, step_frozen
from ds_comm.optim.base import Entry, SelfReducingOptimizer
from ds_comm.optim.options import CompressionOptions, adam_defaults, check_peer_arguments


class OneBitAdam(SelfReducingOptimizer):
    """1-bit Adam (Tang et al. 2021, arXiv 2102.02888, algorithm 1), with decoupled weight decay.

    For `freeze_step` updates: AdamW over gradients that are reduced at full precision. Then the variance is frozen, and
    each rank adds its own gradient to the momentum, which is averaged over ranks by a two-phase compressed all-reduce:
    1/32 of the bytes of fp32, in two collectives for all parameters. Equations: docs/notes/onebit.md.
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
        weight_decay: decoupled.
        freeze_step: updates at full precision; the papers take 15 to 20 % of all, and at least the warm-up of the
            learning rate.
        max_grad_norm: clips gradients; 0 does not. In the compressed phase the norm is that of `StepReport.grad_norm`.
        bias_correction: False: as in the paper.
        group: the ranks that train replicas; None: all.
        compression: None: the defaults.
        **peer: arguments of DeepSpeed's optimizer without effect here: cuda_aware, comm_backend_name,
            eps_inside_sqrt=False, amsgrad=False.
        """
        check_peer_arguments("OneBitAdam", peer)
        defaults = adam_defaults(lr, betas, eps, weight_decay, bias_correction)
        super().__init__(
            params,
            defaults,
            freeze_step=freeze_step,
            max_grad_norm=max_grad_norm,
            group=group,
            compression=compression,
        )

    def _dense_step(self, entries: Sequence[Entry], sums: Sequence[Tensor], factor: float) -> None:
        dense_adam(entries, sums, factor)
        for entry in entries:
            if entry.step + 1 >= self.freeze_step:
                floor_variance(entry.state["exp_avg_sq"], self.compression)

    def _compressed_step(self, entries: Sequence[Entry], factor: float) -> None:
        state = self.compressed_state
        momenta = state.update([e.param for e in entries], [e.state["exp_avg"] for e in entries])
        for entry, momentum in zip(entries, momenta, strict=True):
            entry.state["exp_avg"] = momentum
            beta1 = float(entry.group["betas"][0])
            momentum.mul_(beta1)
            if entry.grad is not None:
                momentum.add_(entry.grad, alpha=(1.0 - beta1) * factor)
        assert state.reduce is not None and state.buffer is not None
        state.reduce(state.buffer)
        for entry, momentum in zip(entries, momenta, strict=True):
            self._apply(entry, momentum)

    def _apply(self, entry: Entry, momentum: Tensor) -> None:
        group, values = entry.group, entry.values
        lr = float(group["lr"])
        bias1, bias2 = bias_corrections(group, entry.step + 1, self.freeze_step)
        if group["weight_decay"] != 0.0:
            values.mul_(1.0 - lr * group["weight_decay"])
        variance = entry.state["exp_avg_sq"]
        step_frozen(values, momentum, variance, eps=group["eps"], bias2=bias2, rate=lr / bias1)
