"""Norms of gradients that are away: computed when gradients arrive, and again after every write."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ds_zero
from contracts.distant_store import DistantStore
from ds_core.kernels import squared_norm
from ds_core.optim import FusedAdam
from ds_zero import _registry
from ds_zero.runtime.gradients.arrived_norms import ArrivedNorms
from ds_zero.runtime.staging import NUM_BUFFERS
from harness import ranks
from zero.models import Tiny, batch

SMALL = {"reduce_bucket_numel": 700, "persistence_threshold_numel": 20}


def make(store: Any, stage: int, dtype: torch.dtype = torch.bfloat16, **config: Any) -> Any:
    torch.manual_seed(0)
    model = Tiny(layers=4)
    optimizer = FusedAdam(model.parameters(), lr=1e-2)
    options = ds_zero.ZeroConfig(param_dtype=dtype, **SMALL, **config)
    return ds_zero.shard(model, optimizer, stage, config=options, store=store, norms=squared_norm)


def buckets_of(model: nn.Module) -> list[Any]:
    return [b for b in _registry.state_of(model).buckets if b.trainable]


def loads(store: DistantStore) -> int:
    return store.calls["load", "grad"]


def measured_by_reading(model: nn.Module) -> float:
    """The norm of gradients that were all loaded."""
    state = _registry.state_of(model)
    arrived, state.norms = state.norms, ArrivedNorms(squared_norm)
    try:
        return float(state.measure())
    finally:
        state.norms = arrived


@ranks(2)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("plan", ["local", "sharded"])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_no_gradient_is_loaded_for_its_norm(stage: int, plan: Any, grad_dtype: torch.dtype) -> None:
    for micros, tree in ((1, False), (3, False), (3, True), (4, True)):
        if tree and plan == "local":
            continue
        store = DistantStore(in_thread=True)
        config = {"accumulation_steps": micros, "grad_dtype": grad_dtype, "rank_invariant": tree}
        model, optimizer = make(store, stage, accumulation=plan, **config)
        for step in range(2):
            for micro in range(micros):
                model(*batch(step * micros + micro, 0)).backward()
            state = _registry.state_of(model)
            state.reducer.finish()
            before = loads(store)
            norm = ds_zero.clip_grad_norm_(model, 0.1)
            assert loads(store) == before
            assert all(state.norms.noted(b) is not None for b in buckets_of(model))
            state.stepper.pending.clip = None
            assert measured_by_reading(model) == norm.item()
            # Those that arrived last are still in buffers.
            away = len([b for b in buckets_of(model) if b.storage.is_away("grad")])
            assert max(0, away - NUM_BUFFERS) <= loads(store) - before <= away
            optimizer.step()
            optimizer.zero_grad()
        ds_zero.destroy(model)


Write = Callable[[nn.Module, torch.optim.Optimizer], object]


def set_whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    name, param = next(iter(model.named_parameters()))
    ds_zero.set_full(model, name, "grad", torch.full_like(param, 3.0, dtype=torch.float32))


def set_own(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    name = next(iter(dict(model.named_parameters())))
    _, numel = ds_zero.local_range(model, name)
    ds_zero.set_local(model, name, "grad", torch.full((numel,), 3.0))


def double(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    ds_zero.update_full_grads(model, model.parameters(), lambda grad, _: 2 * grad)


def zero_one(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"][0].grad.zero_()


def remove_one(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"][0].grad = None


def backward_again(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(*batch(7, 0)).backward()


@pytest.mark.parametrize("write", [set_whole, set_own, double, zero_one, remove_one, backward_again])
def test_a_write_makes_the_norm_of_that_gradient(write: Write) -> None:
    for stage in (1, 3):
        model, optimizer = make(DistantStore(), stage)
        model(*batch(0, 0)).backward()
        first = ds_zero.clip_grad_norm_(model, 0).item()
        write(model, optimizer)
        norm = ds_zero.clip_grad_norm_(model, 0).item()
        assert norm != first
        assert measured_by_reading(model) == norm
        # The same on gradients that stay in memory.
        resident, other = make(None, stage)
        resident(*batch(0, 0)).backward()
        ds_zero.clip_grad_norm_(resident, 0)
        write(resident, other)
        assert ds_zero.clip_grad_norm_(resident, 0).item() == norm


def test_a_read_leaves_the_norm() -> None:
    store = DistantStore()
    model, _ = make(store, 3)
    model(*batch(0, 0)).backward()
    norm = ds_zero.clip_grad_norm_(model, 0)
    for name, _ in model.named_parameters():
        ds_zero.get_full(model, name, "grad")
    before = loads(store)
    assert torch.equal(ds_zero.clip_grad_norm_(model, 0), norm)
    assert loads(store) == before


@ranks(2)
def test_an_overflow_is_found_and_named_without_loading_other_gradients() -> None:
    for bad in (math.inf, math.nan):
        store = DistantStore()
        model, optimizer = make(store, 2, torch.float16)
        scaler = ds_zero.LossScaler(model, 1.0)
        scaler.scale(model(*batch(0, 0)).float()).backward()
        _registry.state_of(model).reducer.finish()
        name = "blocks.1.up.weight"
        grad = ds_zero.get_full(model, name, "grad")
        assert grad is not None
        grad.view(-1)[0] = bad
        ds_zero.set_full(model, name, "grad", grad)
        before = loads(store)
        optimizer.step()
        assert scaler.step_was_skipped and scaler.culprit is not None and name in scaler.culprit
        # The bucket that was written, for the norm and for the name.
        assert loads(store) - before <= 2
        ds_zero.destroy(model)
