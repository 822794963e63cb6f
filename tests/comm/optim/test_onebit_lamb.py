"""1-bit LAMB: the first phase is LAMB, the second one follows the paper's equations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from comm.optim.models import OneBitAdamOnAllRanks, gradients, loss_of, mlp
from ds_comm.compress import SignCompressor
from ds_comm.optim import CompressionOptions, OneBitLamb
from ds_core.optim import FusedLamb
from harness import ranks

PLAIN = CompressionOptions(compressor=SignCompressor(block_numel=64), variance_floor=0.0)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        optimizer.zero_grad()
        loss = loss_of(model, dist.get_rank(), step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@ranks(2)
def test_the_first_phase_is_lamb_over_mean_gradients() -> None:
    model, twin = mlp(), mlp()
    optimizer = OneBitLamb(model.parameters(), lr=1e-2, weight_decay=0.1)
    plain = FusedLamb(twin.parameters(), lr=1e-2, eps=1e-8, weight_decay=0.1, min_ratio=0.01, max_ratio=10.0)
    for step in range(8):
        _train(model, optimizer, step, step + 1)
        for p, *grads in zip(twin.parameters(), *(gradients(twin, r, step) for r in range(2)), strict=True):
            p.grad = torch.stack(grads).mean(0)
        plain.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


class OnAllRanks(OneBitAdamOnAllRanks):
    """Algorithm 1 of the paper for all ranks, with factors as in section 4.2."""

    def lamb(
        self, gradients_of_ranks: Any, coeffs: list[float], fresh: list[torch.Tensor], factors: list[float]
    ) -> None:
        self.steps += 1
        beta1, beta2 = self.betas
        for i, p in enumerate(self.params):
            grads = [grads[i] for grads in gradients_of_ranks]
            dense = self.steps <= self.freeze_step
            before = self.momenta[i]
            if dense:
                mean = torch.stack(grads).mean(0)
                self.momenta[i] = beta1 * before + (1 - beta1) * mean
                self.variances[i] = beta2 * self.variances[i] + (1 - beta2) * mean.square()
            else:
                self.momenta[i] = self._reduced(i, [beta1 * before + (1 - beta1) * g for g in grads])
                rebuilt = (self.momenta[i] - beta1 * before) / (1 - beta1)
                fresh[i] = beta2 * fresh[i] + (1 - beta2) * rebuilt.square()
            bias1, bias2 = 1 - beta1**self.steps, 1 - beta2 ** min(self.steps, self.freeze_step)
            direction = self.momenta[i] / bias1 / ((self.variances[i] / bias2).sqrt() + self.eps)
            change = direction + self.weight_decay * p
            if dense:
                ratio = min(max(float(p.norm() / change.norm()), 0.01), 10.0)
                coeffs[i] = ratio if self.steps == 1 else 0.9 * coeffs[i] + 0.1 * ratio
                fresh[i] = self.variances[i]
            else:
                factor = float(((self.variances[i].sqrt() + self.eps) / (fresh[i].sqrt() + self.eps)).max())
                share = min(1.0, float(direction.norm() / change.norm()))
                factor = min(max(factor * share + 1 - share, 0.5), 4.0)
                factors[i] = min(max(factor, factors[i] * 0.9), factors[i] * 1.1)
                ratio = coeffs[i] * factors[i]
            p.sub_(self.lr * ratio * change)


@ranks(2)
def test_the_equations_of_the_paper() -> None:
    model, twin = mlp(), mlp()
    for net in (model, twin):
        for p in net.parameters():
            p.detach().add_(0.01)  # no tensor of zeros, whose ratio is 1
    options: dict[str, Any] = {"lr": 1e-3, "freeze_step": 5, "weight_decay": 0.1}
    optimizer = OneBitLamb(model.parameters(), compression=PLAIN, **options)
    expected = OnAllRanks([p.detach() for p in twin.parameters()], 2, block_numel=64, **options)
    count = len(expected.params)
    coeffs, fresh, factors = [0.0] * count, [torch.zeros(())] * count, [1.0] * count
    for step in range(9):
        expected.lamb([gradients(twin, rank, step) for rank in range(2)], coeffs, fresh, factors)
        _train(model, optimizer, step, step + 1)
    for i, (p, q) in enumerate(zip(model.parameters(), twin.parameters(), strict=True)):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
        assert optimizer.state[p]["coeff"] == pytest.approx(coeffs[i], rel=1e-3)
        assert optimizer.state[p]["factor"] == pytest.approx(factors[i], rel=2e-2)
    assert any(factor != 1.0 for factor in factors)


@ranks(2)
@pytest.mark.parametrize("at", [3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_exact(at: int, dtype: torch.dtype) -> None:
    model = mlp(dtype=dtype)
    optimizer = OneBitLamb(model.parameters(), lr=1e-2, freeze_step=5)

    def train(net: nn.Module, stepped: OneBitLamb, first: int, last: int) -> None:
        for step in range(first, last):
            stepped.zero_grad()
            loss_of(net, dist.get_rank(), step, dtype).backward()
            stepped.step()

    train(model, optimizer, 0, at)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, at, 12)
    again = mlp(dtype=dtype)
    again.load_state_dict(weights)
    resumed = OneBitLamb(again.parameters(), lr=1.0, freeze_step=5)
    resumed.load_state_dict(state)
    train(again, resumed, at, 12)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_arguments() -> None:
    params = list(mlp().parameters())
    with pytest.raises(ValueError, match="0 <= min_coeff <= max_coeff"):
        OneBitLamb(params, min_coeff=11.0)
    with pytest.raises(ValueError, match=r"coeff_beta must lie in \[0, 1\), but is 1.0"):
        OneBitLamb(params, coeff_beta=1.0)
    with pytest.raises(ValueError, match="OneBitLamb: amsgrad=True is not supported"):
        OneBitLamb(params, amsgrad=True)
    assert OneBitLamb.reduces_gradients is True
