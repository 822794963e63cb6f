"""Tensors that are away: what is not loaded, because it is in a buffer, and what is loaded ahead."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

import ds_zero
from contracts.distant_store import DistantStore
from ds_core.optim import FusedAdam
from ds_zero import _registry
from ds_zero.runtime.staging import NUM_BUFFERS
from zero.models import Tiny, batch

CONFIG = ds_zero.ZeroConfig(
    param_dtype=torch.bfloat16, persistence_threshold_numel=0, accumulation_steps=1, reduce_bucket_numel=1500
)


def make(store: DistantStore, **options: Any) -> tuple[Tiny, FusedAdam]:
    torch.manual_seed(0)
    model = Tiny(layers=6)
    optimizer = FusedAdam(model.parameters(), lr=1e-2)
    ds_zero.shard(model, optimizer, 3, config=replace(CONFIG, **options), store=store)
    return model, optimizer


def num_buckets(model: Tiny) -> int:
    return sum(b.trainable for b in _registry.state_of(model).buckets)


def started(store: DistantStore, kind: str, action: str = "load") -> list[str]:
    return [key.name for act, key in store.log if act == action and key.kind == kind]


def test_gradients_that_arrived_last_are_stepped_without_being_loaded() -> None:
    store = DistantStore()
    model, optimizer = make(store)
    away = num_buckets(model)
    assert away > NUM_BUFFERS
    for step in range(2):
        model(*batch(step, 0)).backward()
        store.log.clear()
        optimizer.step()
        optimizer.zero_grad()
        assert len(started(store, "grad")) == away - NUM_BUFFERS
    ds_zero.destroy(model)


def test_masters_of_the_first_buckets_are_loaded_at_the_end_of_the_backward() -> None:
    store = DistantStore()
    model, optimizer = make(store)
    model(*batch(0, 0)).backward()
    expected = started(store, "master")
    assert len(expected) == NUM_BUFFERS - 1
    store.log.clear()
    optimizer.step()
    assert not set(started(store, "master")) & set(expected)
    assert started(store, "master", "store")[: NUM_BUFFERS - 1] == expected
    ds_zero.destroy(model)


def test_parameters_in_fp32_of_the_first_modules_are_not_loaded_right_after_a_step() -> None:
    store = DistantStore()
    model, optimizer = make(store, param_dtype=None)
    for step in range(2):
        model(*batch(step, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    names = [b.layout.name for b in _registry.state_of(model).buckets if b.trainable]
    assert len(names) > NUM_BUFFERS + 1
    store.log.clear()
    with torch.no_grad():
        model(*batch(2, 0))
    assert set(started(store, "master")) == set(names[:-NUM_BUFFERS])
    ds_zero.destroy(model)


def test_values_set_after_the_backward_are_those_that_the_step_starts_from() -> None:
    results = []
    for away in ((), ("master", "grad", "param")):
        model, optimizer = make(DistantStore(away))
        model(*batch(0, 0)).backward()  # masters are on their way to memory
        names = dict(model.named_parameters())
        for name, param in names.items():
            ds_zero.set_full(model, name, "param", torch.full(param.shape, 0.25))
        optimizer.step()
        results.append(ds_zero.full_state_dict(model))
        ds_zero.destroy(model)
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_a_backward_without_a_step_needs_no_further_buffers() -> None:
    store = DistantStore()
    model, optimizer = make(store)
    for number in range(4):
        model(*batch(number, 0)).backward()
        optimizer.zero_grad()
    state = _registry.state_of(model)
    staging = next(b.storage.staging for b in state.buckets if b.trainable)
    largest = max(b.storage.rest("grad").pieces[0].numel() for b in state.buckets if b.trainable)
    assert staging.num_bytes("grad") >= 4 * largest
    for kind, width in (("grad", 4), ("master", 4)):
        numel = max(b.owned_range[1] - b.owned_range[0] for b in state.buckets if b.trainable)
        assert staging.num_bytes(kind) <= NUM_BUFFERS * numel * width
    ds_zero.destroy(model)


@pytest.mark.parametrize(("away", "ahead"), [((), 1), (("param",), 3)])
def test_three_units_are_loaded_ahead_if_parameters_are_away(away: tuple[str, ...], ahead: int) -> None:
    store = DistantStore(away)
    model, _ = make(store)
    state = _registry.state_of(model)
    most = 0
    model(*batch(0, 0))  # the order is learned
    original = type(state.gatherer).start

    def start(gatherer: object, bucket: object) -> None:
        nonlocal most
        original(gatherer, bucket)  # type: ignore[arg-type]
        gathered = [b for b in state.buckets if b.state.value in ("gathering", "gathered") and not b.whole]
        most = max(most, len(gathered))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(state.gatherer), "start", start)
        with torch.no_grad():
            model(*batch(1, 0))
            most = 0
            model(*batch(1, 0))
    assert most == 1 + ahead
    loads = [name for name, _ in itertools.groupby(started(store, "param"))]
    assert bool(loads) == bool(away)
    ds_zero.destroy(model)
