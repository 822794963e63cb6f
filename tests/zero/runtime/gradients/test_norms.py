"""Norms: exact to fp32, and the same however tensors are cut."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import ds_zero
from ds_core import kernels
from ds_core.optim import FusedAdam
from harness import ranks
from zero.models import Tiny, batch


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200_000), st.integers(0, 200_000), st.integers(0, 2**31))
def test_a_cut_does_not_change_the_norm(numel: int, cut: int, seed: int) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    cut = min(cut, numel)
    whole = ds_zero.total_norm([x])
    assert torch.equal(ds_zero.total_norm([x[:cut], x[cut:]]), whole)
    assert torch.equal(whole, x.double().norm().float())
    assert torch.equal(ds_zero.total_norm([x], kernels.squared_norm), whole)


@pytest.mark.parametrize("bad, check", [(math.inf, math.isinf), (math.nan, math.isnan)])
def test_what_is_not_finite_is_found(bad: float, check: object) -> None:
    x = torch.ones(100_000)
    x[77_777] = bad
    total, finite = ds_zero.squared_norm([x])
    assert not finite
    assert check(total)  # type: ignore[operator]
    assert ds_zero.squared_norm([]) == (0.0, True)


@ranks(2)
@pytest.mark.parametrize("max_norm", [0.0, math.inf, 1e9, 0.1])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_clipping(stage: int, max_norm: float) -> None:
    torch.manual_seed(0)
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ds_zero.shard(model, optimizer, stage)
    model(*batch(0, dist.get_rank())).backward()
    before = ds_zero.clip_grad_norm_(model, 0)
    assert torch.equal(ds_zero.clip_grad_norm_(model, max_norm), before)
    after = ds_zero.clip_grad_norm_(model, 0)
    expected = 0.1 if max_norm == 0.1 else before.item()
    assert after.item() == pytest.approx(expected, rel=1e-5)


@ranks(2)
def test_one_ranks_nan_is_everybodys() -> None:
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ds_zero.shard(model, optimizer, 2)
    model(*batch(0, dist.get_rank())).backward()
    shards = [s for s in optimizer.param_groups[0]["params"] if s.grad is not None]
    if dist.get_rank() == 1:
        shards[0].grad[0] = math.nan
    assert math.isnan(ds_zero.clip_grad_norm_(model, 1.0))


@ranks(2)
@pytest.mark.parametrize("fused", [True, False])
def test_a_factor_belongs_to_the_gradients_it_was_found_for(fused: bool) -> None:
    """Clip, skip the step (as for a gradient that is not finite), then step without clipping."""
    results = []
    for clip_first in (True, False):
        torch.manual_seed(0)
        model = Tiny()
        optimizer = (FusedAdam if fused else torch.optim.AdamW)(model.parameters(), lr=1e-2)
        ds_zero.shard(model, optimizer, 2)
        model(*batch(0, dist.get_rank())).backward()
        if clip_first:
            ds_zero.clip_grad_norm_(model, 1e-9)
        optimizer.zero_grad()
        for step in (1, 2):
            model(*batch(step, dist.get_rank())).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(ds_zero.full_state_dict(model))
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])
