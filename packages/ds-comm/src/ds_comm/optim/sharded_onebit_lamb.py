"""1-bit LAMB with ZeRO stage 1."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm.exchange import wire
from ds_comm.optim.adam_parts import bias_corrections, floor_variance, quotient
from ds_comm.optim.lamb_parts import averaged_ratio, kernel_options, lamb_defaults, limited_factor
from ds_comm.optim.options import CompressionOptions, adam_defaults, check_peer_arguments
from ds_comm.optim.sharded import Segment, ShardedOptimizer
from ds_core import kernels


class ShardedOneBitLamb(ShardedOptimizer):
    """1-bit LAMB whose momentum, both variances and fp32 masters are divided among the ranks: see `ShardedOptimizer`.

    Trust ratios and factors are those of whole tensors: the owners' sums of squares and largest quotients are reduced
    over the ranks, 16 bytes a parameter in the first phase, and 24 in the second one, in which there are so two small
    messages more than in `ShardedOneBitAdam`.
    """

    state_names: ClassVar[tuple[str, ...]] = ("master", "exp_avg", "exp_avg_sq", "fresh")
    number_names: ClassVar[tuple[str, ...]] = ("coeff", "factor")

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
        """Args are those of `OneBitLamb`. All parameters must be on one device."""
        check_peer_arguments("ShardedOneBitLamb", peer)
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

    def _table(self, columns: int) -> Tensor:
        return torch.zeros(len(self._params), columns, dtype=torch.float64, device=self._master.device)

    def _moments(self, segment: Segment) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        here = segment.owned
        return [self._master[here]], [self._parts["exp_avg"][here]], [self._parts["exp_avg_sq"][here]]

    def _update_dense(self, mean: Tensor, present: Sequence[bool], clip: float) -> None:
        groups, squares = self._groups(), self._table(2)
        own = [segment for segment in self._segments if present[segment.index]]
        for segment in own:
            options = kernel_options(groups[segment.index], self._steps[segment.index] + 1)
            grads = [mean[segment.owned]]
            sums = kernels.lamb_moments(*self._moments(segment), grads, grad_scale=clip, **options)
            squares[segment.index] += sums[0].to(squares.device)
        self.channel.all_reduce(squares).wait()
        ratios = [
            kernels.trust_ratios(row[None], group["min_coeff"], group["max_coeff"])[0]
            for row, group in zip(squares.cpu(), groups, strict=True)
        ]
        for segment in own:
            group, ratio = groups[segment.index], ratios[segment.index]
            options = kernel_options(group, self._steps[segment.index] + 1)
            kernels.lamb_apply(*self._moments(segment), [ratio], lr=float(group["lr"]), **options)
        self._numbers["coeff"] = [
            _number(averaged_ratio(group, _known(average), ratio)) if has else average
            for average, ratio, group, has in zip(
                self._numbers["coeff"], ratios, groups, present, strict=True
            )
        ]
        if max(self._steps) + 1 >= self.freeze_step:
            for segment in self._segments:
                floor_variance(self._parts["exp_avg_sq"][segment.owned], self.compression)
            self._parts["fresh"].copy_(self._parts["exp_avg_sq"])

    def _update_compressed(self, mean: Tensor) -> None:
        groups, squares, largest = self._groups(), self._table(2), self._table(1)
        changes = [self._change(segment, groups[segment.index], mean) for segment in self._segments]
        for segment, (direction, change) in zip(self._segments, changes, strict=True):
            row = torch.stack([x.to(torch.float64).square().sum() for x in (direction, change)])
            squares[segment.index] += row
            group, here = groups[segment.index], segment.owned
            frozen = self._parts["exp_avg_sq"][here].sqrt().add_(group["eps"])
            ratio = (frozen / self._parts["fresh"][here].sqrt().add_(group["eps"])).max()
            largest[segment.index, 0] = ratio.to(torch.float64)
        self.channel.all_reduce(squares).wait()
        self.channel.all_reduce(largest, dist.ReduceOp.MAX).wait()
        norms = squares.sqrt().tolist()
        factors = [
            limited_factor(group, _known(last) or 1.0, most, direction, change)
            for group, last, [most], (direction, change) in zip(
                groups, self._numbers["factor"], largest.tolist(), norms, strict=True
            )
        ]
        self._numbers["factor"] = list(factors)
        for segment, (_, change) in zip(self._segments, changes, strict=True):
            index = segment.index
            coeff = _known(self._numbers["coeff"][index])
            rate = float(groups[index]["lr"]) * (1.0 if coeff is None else coeff) * factors[index]
            self._master[segment.owned].add_(change, alpha=-rate)

    def _change(self, segment: Segment, group: Mapping[str, Any], mean: Tensor) -> tuple[Tensor, Tensor]:
        """Updates momentum and fresh variance. Returns the update without and with weight decay."""
        here, (beta1, beta2) = segment.owned, (float(beta) for beta in group["betas"])
        momentum, fresh = self._parts["exp_avg"][here], self._parts["fresh"][here]
        gradient = momentum.mul(-beta1).add_(mean[here]).div_(1.0 - beta1)
        momentum.copy_(mean[here])
        fresh.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        bias1, bias2 = bias_corrections(group, self._steps[segment.index] + 1, self.freeze_step)
        variance = self._parts["exp_avg_sq"][here]
        direction = quotient(momentum, variance, group["eps"], bias2).div_(bias1)
        if group["weight_decay"] == 0.0:
            return direction, direction
        return direction, direction + group["weight_decay"] * self._master[here]

    def planned_bytes(self, numels: Sequence[int], num_ranks: int) -> int:
        """As `ReducingOptimizer.planned_bytes`."""
        tables = [wire.all_reduce_bytes(8 * columns * len(numels), num_ranks) for columns in (2, 1)]
        return super().planned_bytes(numels, num_ranks) + (0 if num_ranks == 1 else sum(tables))


def _known(number: float) -> float | None:
    return None if math.isnan(number) else number


def _number(value: float | None) -> float:
    return math.nan if value is None else value
