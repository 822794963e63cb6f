"""1-bit Adam with ZeRO stage 1."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ds_comm.optim.adam_parts import bias_corrections, floor_variance, step_frozen, step_group
from ds_comm.optim.options import CompressionOptions, adam_defaults, check_peer_arguments
from ds_comm.optim.sharded import Segment, ShardedOptimizer


class ShardedOneBitAdam(ShardedOptimizer):
    """1-bit Adam whose momentum, variance and fp32 masters are divided among the ranks: see `ShardedOptimizer`.

    For `freeze_step` updates the owners step AdamW; then the variance is frozen, and the mean of the compressed momenta
    is the momentum.
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
        """Args are those of `OneBitAdam`. All parameters must be on one device."""
        check_peer_arguments("ShardedOneBitAdam", peer)
        super().__init__(
            params,
            adam_defaults(lr, betas, eps, weight_decay, bias_correction),
            freeze_step=freeze_step,
            max_grad_norm=max_grad_norm,
            group=group,
            compression=compression,
        )

    def _update_dense(self, mean: Tensor, present: Sequence[bool], clip: float) -> None:
        momenta, variances = self._parts["exp_avg"], self._parts["exp_avg_sq"]
        groups = self._groups()
        batches: dict[tuple[int, int], list[Segment]] = {}
        for segment in self._segments:
            if present[segment.index]:
                key = (id(groups[segment.index]), self._steps[segment.index])
                batches.setdefault(key, []).append(segment)
        for members in batches.values():
            step_group(
                groups[members[0].index],
                self._steps[members[0].index],
                [self._master[s.owned] for s in members],
                [momenta[s.owned] for s in members],
                [variances[s.owned] for s in members],
                [mean[s.owned] for s in members],
                clip,
            )
        if max(self._steps) + 1 >= self.freeze_step:
            for segment in self._segments:
                floor_variance(variances[segment.owned], self.compression)

    def _update_compressed(self, mean: Tensor) -> None:
        groups = self._groups()
        for segment in self._segments:
            group, here = groups[segment.index], segment.owned
            lr = float(group["lr"])
            momentum, master = self._parts["exp_avg"][here], self._master[here]
            momentum.copy_(mean[here])
            bias1, bias2 = bias_corrections(group, self._steps[segment.index] + 1, self.freeze_step)
            if group["weight_decay"] != 0.0:
                master.mul_(1.0 - lr * group["weight_decay"])
            variance = self._parts["exp_avg_sq"][here]
            step_frozen(master, momentum, variance, eps=group["eps"], bias2=bias2, rate=lr / bias1)
