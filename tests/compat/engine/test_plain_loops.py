"""Loops that read and write `param.grad` between backward and step, as they do with DeepSpeed's engine."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_zero
from compat.engine.test_engine import batch, make, plain
from harness import ranks


@ranks(2)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_clipping_by_hand_at_stage_0(accumulation: int) -> None:
    engine = make(0, accumulation)
    losses = []
    for step in range(6):
        loss = engine(*batch(step, dist.get_rank()))
        engine.backward(loss)
        trained = [p for p in engine.module.parameters() if p.requires_grad]
        if engine.is_gradient_accumulation_boundary():
            assert all(torch.equal(p.grad, ds_zero.get_full(None, p, "grad")) for p in trained)
            assert nn.utils.clip_grad_norm_(engine.module.parameters(), 1.0) > 1.0
        else:
            assert all(p.grad is None for p in trained)  # not complete yet
        engine.step()
        losses.append(loss.item())
    assert all(p.grad is None for p in engine.module.parameters())
    assert losses == pytest.approx(plain(6, accumulation, 2)[dist.get_rank()], rel=1e-5)
    engine.destroy()


@ranks(2)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_parameters_show_no_gradient_where_ranks_share_it(stage: int) -> None:
    engine = make(stage)
    engine.backward(engine(*batch(0, dist.get_rank())))
    assert all(p.grad is None for p in engine.module.parameters())
    engine.step()
    engine.destroy()


@ranks(2)
def test_gradients_that_are_replaced_dropped_or_made_by_hand_are_those_of_the_step() -> None:
    engine = make(0, optimizer={"type": "SGD", "params": {"lr": 1.0}}, gradient_clipping=0.0)
    first, second, last = engine.module.layers
    for _ in range(2):
        before = {p: p.detach().clone() for p in engine.module.parameters()}
        engine.backward(engine(*batch(0, dist.get_rank())))
        scaled = first.weight.grad.clone() * 2
        first.weight.grad = scaled.clone()
        second.weight.grad = None
        last.weight.grad.zero_()
        engine.step()
        assert torch.allclose(before[first.weight] - first.weight, scaled, atol=1e-6)
        assert torch.equal(before[second.weight], second.weight)
        assert torch.equal(before[last.weight], last.weight)
        assert not torch.equal(before[first.bias], first.bias)
    before_bias = first.bias.detach().clone()
    first.bias.grad = torch.ones_like(first.bias)  # without any backward
    engine.step()
    assert torch.allclose(before_bias - first.bias, torch.ones_like(first.bias), atol=1e-6)
    engine.destroy()


@ranks(2)
def test_parameters_without_a_gradient_are_named() -> None:
    engine = make(2, zero_optimization={"stage": 2, "ignore_unused_parameters": False})
    x, _ = batch(0, dist.get_rank())
    engine.backward(engine.module.layers[0](x).sum())
    with pytest.raises(AssertionError, match=r"head\.weight \(0 of 2 ranks\).*ignore_unused_parameters"):
        engine.step()
    engine.destroy()
