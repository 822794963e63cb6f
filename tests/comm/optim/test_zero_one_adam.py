"""0/1 Adam: its schedules, and the algorithm of the paper for all ranks in one process."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from comm.optim.models import OneBitAdamOnAllRanks, gradients, loss_of, mlp
from ds_comm.compress import SignCompressor
from ds_comm.optim import CompressionOptions, ZeroOneAdam
from ds_comm.optim.zero_one_adam import synchronises, variance_step, variance_updates
from harness import ranks

PLAIN = CompressionOptions(compressor=SignCompressor(block_numel=64))


def test_schedules() -> None:
    renewed = [step for step in range(1, 40) if variance_step(step, 4)]
    assert renewed == [1, 2, 3, 4, 5, 7, 9, 11, 13, 17, 21, 25, 29, 37]
    for step in range(60):
        assert variance_updates(step, 4) == sum(variance_step(s, 4) for s in range(1, step + 1))
    averaged = [step for step in range(1, 30) if synchronises(step, 4, 4)]
    assert averaged == [1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28]
    assert all(synchronises(step, 4, 1) for step in range(1, 30))
    assert [step for step in range(1, 14) if synchronises(step, 3, 4)] == [1, 2, 3, 5, 7, 11]


class OnAllRanks(OneBitAdamOnAllRanks):
    """Algorithm 1 with the policies of section 6, for two ranks, with u = sum of lr m since the last average."""

    def train(
        self, model: nn.Module, options: dict[str, int], weight_decay: float, last: int
    ) -> list[Tensor]:
        beta1, beta2 = self.betas
        params = list(model.parameters())
        own = [[p.detach().clone() for p in params] for _ in range(self.world_size)]
        momenta = [[torch.zeros_like(p) for p in params] for _ in range(self.world_size)]
        sums = [[torch.zeros_like(p) for p in params] for _ in range(self.world_size)]
        anchor = [p.detach().clone() for p in params]
        rates, renewals = 0.0, 0
        for step in range(1, last + 1):
            grads = []
            for rank in range(self.world_size):
                for p, value in zip(params, own[rank], strict=True):
                    p.detach().copy_(value)
                grads.append(gradients(model, rank, step - 1))
            frozen = step > options["var_freeze_step"]
            renew = not frozen and variance_step(step, options["var_update_scaler"])
            renewals += renew
            rate = self.lr / (1 - beta1**step)
            rates += rate
            average = not frozen or synchronises(
                step - options["var_freeze_step"], options["local_step_scaler"], options["local_step_clipper"]
            )
            for i in range(len(params)):
                anchor[i] *= 1 - self.lr * weight_decay
                if renew:
                    mean = torch.stack([g[i] for g in grads]).mean(0)
                    self.variances[i] = beta2 * self.variances[i] + (1 - beta2) * mean.square()
                    for rank in range(self.world_size):
                        momenta[rank][i] = beta1 * momenta[rank][i] + (1 - beta1) * mean
                        sums[rank][i] = rate * momenta[rank][i]
                    total = sums[0][i]
                else:
                    for rank in range(self.world_size):
                        momenta[rank][i] = beta1 * momenta[rank][i] + (1 - beta1) * grads[rank][i]
                        sums[rank][i] = sums[rank][i] + rate * momenta[rank][i]
                    if average:
                        total = self._reduced(i, [s[i] for s in sums])
                root = (self.variances[i] / (1 - beta2**renewals)).sqrt() + self.eps
                for rank in range(self.world_size):
                    own[rank][i] = anchor[i] - (total if average else sums[rank][i]) / root
                if average:
                    anchor[i] = own[0][i].clone()
                    for rank in range(self.world_size):
                        momenta[rank][i] = total / rates
                        sums[rank][i] = torch.zeros_like(anchor[i])
            rates = 0.0 if average else rates
        return own[dist.get_rank()]


def _train(model: nn.Module, optimizer: ZeroOneAdam, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        optimizer.zero_grad()
        loss = loss_of(model, dist.get_rank(), step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


OPTIONS: dict[str, Any] = {
    "var_freeze_step": 6,
    "var_update_scaler": 2,
    "local_step_scaler": 2,
    "local_step_clipper": 4,
}


@ranks(2)
@pytest.mark.parametrize("last", [5, 6, 9, 12, 14])
def test_the_algorithm_of_the_paper(last: int) -> None:
    model, twin = mlp(), mlp()
    optimizer = ZeroOneAdam(model.parameters(), lr=1e-3, weight_decay=0.1, compression=PLAIN, **OPTIONS)
    expected = OnAllRanks([p.detach() for p in twin.parameters()], 2, 1e-3, 0, block_numel=64)
    values = expected.train(twin, OPTIONS, 0.1, last)
    _train(model, optimizer, 0, last)
    for p, q in zip(model.parameters(), values, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-3, atol=1e-4)


@ranks(2)
def test_ranks_agree_where_they_are_synchronised() -> None:
    model = mlp(dtype=torch.bfloat16)
    optimizer = ZeroOneAdam(model.parameters(), lr=1e-2, **OPTIONS)
    alone = 0
    for step in range(40):
        calls = optimizer.traffic.num_calls
        optimizer.zero_grad()
        loss_of(model, dist.get_rank(), step, torch.bfloat16).backward()
        optimizer.step()
        weight = optimizer.state[model[0].weight]["master"]
        parts = [torch.empty_like(weight) for _ in range(2)]
        dist.all_gather(parts, weight)
        assert torch.equal(parts[0], parts[1]) == optimizer.synchronised
        alone += not optimizer.synchronised
        assert (optimizer.traffic.num_calls == calls) == (not optimizer.synchronised)
    assert alone > 20


@ranks(2)
@pytest.mark.parametrize("at", [4, 8, 13, 16])
def test_resuming_is_exact_also_between_synchronisations(at: int) -> None:
    model = mlp()
    optimizer = ZeroOneAdam(model.parameters(), lr=1e-2, **OPTIONS)
    _train(model, optimizer, 0, at)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    if optimizer.synchronised:
        assert optimizer.whole_state_dict()["error_feedback"]["form"] == "whole"
    else:
        with pytest.raises(RuntimeError, match=r"save where optimizer.synchronised is True"):
            optimizer.whole_state_dict()
    _train(model, optimizer, at, 24)
    again = mlp()
    again.load_state_dict(weights)
    resumed = ZeroOneAdam(
        again.parameters(), lr=1.0, compression=CompressionOptions(broadcast_parameters=False), **OPTIONS
    )
    resumed.load_state_dict(state)
    _train(again, resumed, at, 24)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


@ranks(2)
def test_an_overflow_between_synchronisations_costs_one_gradient() -> None:
    model = mlp()
    optimizer = ZeroOneAdam(model.parameters(), lr=1e-3, **OPTIONS)
    for step in range(30):
        optimizer.zero_grad()
        loss_of(model, dist.get_rank(), step).backward()
        if step in (3, 17) and dist.get_rank() == 1:
            model[0].weight.grad.fill_(math.nan)  # type: ignore[union-attr]
        optimizer.step()
        assert optimizer.report is not None
        assert optimizer.report.skipped == (step == 3 or (step == 17 and dist.get_rank() == 1))
    assert all(p.isfinite().all() for p in model.parameters())


def test_arguments() -> None:
    with pytest.raises(ValueError, match="var_update_scaler must be at least 1, but is 0"):
        ZeroOneAdam(mlp().parameters(), var_update_scaler=0)
    with pytest.raises(TypeError, match="unexpected argument 'freeze_step'"):
        ZeroOneAdam(mlp().parameters(), freeze_step=3)
    assert ZeroOneAdam.reduces_gradients is True
