"""0/1 Adam."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm.optim.adam_parts import bias_corrections, quotient, step_frozen
from ds_comm.optim.base import Entry, SelfReducingOptimizer
from ds_comm.optim.options import CompressionOptions, adam_defaults, check_peer_arguments

_SMALLEST_LR = 1e-12


def variance_step(step: int, scaler: int) -> bool:
    """Whether update number `step` (from 1) renews the variance: every update for `scaler` updates, then every second
    one for `scaler` times, then every fourth one, and so on.

    Section 6 of the paper: k_{j+1} - k_j = 2^floor(j / scaler).
    """
    interval, first = 1, 1
    while step >= first + scaler * interval:
        first += scaler * interval
        interval *= 2
    return (step - first) % interval == 0


def variance_updates(step: int, scaler: int) -> int:
    """Number of renewals of the variance in updates 1 to `step`."""
    interval, first, count = 1, 1, 0
    while step >= first + scaler * interval:
        first += scaler * interval
        interval *= 2
        count += scaler
    return count + (step - first) // interval + 1 if step >= 1 else 0


def synchronises(local_step: int, scaler: int, clipper: int) -> bool:
    """Whether update number `local_step` (from 1) after the variance was frozen averages over ranks. The interval
    doubles every `scaler` updates, up to `clipper`.
    """
    interval, first, length = 1, 0, scaler
    while interval * 2 <= clipper and local_step > first + length:
        first += length
        interval *= 2
        length = -(-scaler // interval) * interval
    return (local_step - first) % interval == 0


class ZeroOneAdam(SelfReducingOptimizer):
    """0/1 Adam (Lu, Li, Zhang, De Sa, He 2022, arXiv 2202.06009, algorithm 1), with decoupled weight decay.

    There is no first phase at full precision. The variance is renewed from gradients that are reduced at full
    precision, at intervals that grow (`var_update_scaler`), until `var_freeze_step`; all other updates send one bit an
    element. After that, ranks step alone between synchronisations, at intervals that grow up to `local_step_clipper`,
    and then average what they accumulated. Between two synchronisations parameters differ between ranks: evaluate and
    save where `synchronised`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        var_freeze_step: int = 100_000,
        var_update_scaler: int = 16,
        local_step_scaler: int = 32_678,
        local_step_clipper: int = 16,
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
        var_freeze_step: the last update that may renew the variance.
        var_update_scaler: renewals before their interval doubles.
        local_step_scaler: updates before the interval of synchronisations doubles.
        local_step_clipper: the largest interval; 1: ranks never step alone.
        max_grad_norm: as for `OneBitAdam`; a rank that steps alone clips its own gradient.
        bias_correction: False: as in the paper.
        group: the ranks that train replicas; None: all.
        compression: None: the defaults. The variance is not raised to a floor.
        **peer: arguments of DeepSpeed's optimizer without effect here, as for `OneBitAdam`.
        """
        check_peer_arguments("ZeroOneAdam", peer)
        defaults = adam_defaults(lr, betas, eps, weight_decay, bias_correction)
        counts = {
            "var_update_scaler": var_update_scaler,
            "local_step_scaler": local_step_scaler,
            "local_step_clipper": local_step_clipper,
        }
        for key, value in counts.items():
            if value < 1:
                raise ValueError(f"{key} must be at least 1, but is {value}")
        self.var_update_scaler = var_update_scaler
        self.local_step_scaler = local_step_scaler
        self.local_step_clipper = local_step_clipper
        super().__init__(
            params,
            defaults,
            freeze_step=var_freeze_step,
            max_grad_norm=max_grad_norm,
            group=group,
            compression=compression,
        )

    @property
    def synchronised(self) -> bool:
        """Whether all ranks have the same parameters."""
        return not any("anchor" in state for state in self.state.values())

    def _is_dense(self, entry: Entry) -> bool:
        step = entry.step + 1
        return step <= self.freeze_step and variance_step(step, self.var_update_scaler)

    def _synchronises(self, entry: Entry) -> bool:
        alone = entry.step + 1 - self.freeze_step
        return alone <= 0 or synchronises(alone, self.local_step_scaler, self.local_step_clipper)

    def _is_local(self, entries: Sequence[Entry]) -> bool:
        return not any(self._synchronises(entry) for entry in entries)

    def _dense_step(self, entries: Sequence[Entry], sums: Sequence[Tensor], factor: float) -> None:
        for entry, total in zip(entries, sums, strict=True):
            beta1, beta2 = entry.group["betas"]
            grad = total.mul_(factor)
            entry.state["exp_avg"].mul_(beta1).add_(grad, alpha=1.0 - beta1)
            entry.state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
            self._decay(entry, entry.values)
            rate, bias2 = self._rate(entry)
            change = quotient(entry.state["exp_avg"], entry.state["exp_avg_sq"], entry.group["eps"], bias2)
            entry.values.add_(change, alpha=-rate)

    def _compressed_step(self, entries: Sequence[Entry], factor: float) -> None:
        state = self.compressed_state
        sums = state.update(
            [e.param for e in entries], [e.state.get("sum", e.state["exp_avg"] * 0.0) for e in entries]
        )
        synchronise = self._synchronises(entries[0])
        for entry, total in zip(entries, sums, strict=True):
            self._accumulate(entry, total, factor, alone=not synchronise)
        if not synchronise:
            return
        assert state.reduce is not None and state.buffer is not None
        state.reduce(state.buffer)
        for entry, total in zip(entries, sums, strict=True):
            values, bias2 = entry.values, self._rate(entry)[1]
            anchor = entry.state.pop("anchor", None)
            if anchor is not None:
                values.copy_(anchor)
            rates = entry.state.pop("rates")
            variance = entry.state["exp_avg_sq"]
            step_frozen(values, total, variance, eps=entry.group["eps"], bias2=bias2, rate=1.0)
            entry.state["exp_avg"].copy_(total).div_(rates)
            entry.state.pop("sum", None)
        state.buffer.zero_()

    def _accumulate(self, entry: Entry, total: Tensor, factor: float, *, alone: bool) -> None:
        """Adds this update to the sum since the last synchronisation, and applies it if this rank steps alone."""
        state, beta1 = entry.state, float(entry.group["betas"][0])
        momentum, values = state["exp_avg"].mul_(beta1), entry.values
        if entry.grad is not None:
            momentum.add_(entry.grad, alpha=(1.0 - beta1) * factor)
        rate, bias2 = self._rate(entry)
        if alone and "anchor" not in state:
            state["anchor"] = values.clone(memory_format=torch.contiguous_format)
        self._decay(entry, state.get("anchor", values))
        total.add_(momentum, alpha=rate)
        state["rates"] = state.get("rates", 0.0) + rate
        if alone:
            state["sum"] = total
            # From the anchor, which is the same on all ranks: taking back what was applied would leave rounding errors.
            values.copy_(state["anchor"])
            step_frozen(values, total, state["exp_avg_sq"], eps=entry.group["eps"], bias2=bias2, rate=1.0)

    def _rate(self, entry: Entry) -> tuple[float, float]:
        """Returns the learning rate divided by the correction of the momentum, and the correction of the variance."""
        step = entry.step + 1
        renewals = variance_updates(min(step, self.freeze_step), self.var_update_scaler)
        bias1, bias2 = bias_corrections(entry.group, step, renewals)
        return max(float(entry.group["lr"]), _SMALLEST_LR) / bias1, bias2

    @staticmethod
    def _decay(entry: Entry, values: Tensor) -> None:
        if entry.group["weight_decay"] != 0.0:
            values.mul_(1.0 - float(entry.group["lr"]) * entry.group["weight_decay"])

    def whole_state_dict(self) -> dict[str, Any]:
        """As `SelfReducingOptimizer.whole_state_dict`. Raises RuntimeError if ranks have different parameters."""
        if not self.synchronised:
            raise RuntimeError(
                "ZeroOneAdam: ranks have different parameters between two synchronisations, so there is no state for "
                "all of them; save where optimizer.synchronised is True, or each rank's own state_dict() and parameters"
            )
        return super().whole_state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As `SelfReducingOptimizer.load_state_dict`."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "rates" in state:
                state["rates"] = float(state["rates"])
