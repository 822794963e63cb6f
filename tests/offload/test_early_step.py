"""Buckets that are updated during the backward: kept, or taken back, always with the bits of a step after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_zero
from contracts.distant_store import DistantStore
from ds_core.optim import FusedAdam
from ds_offload import CPUAdam, CPULamb, HostStore, PagedOptimizer
from ds_zero import _registry
from ds_zero.runtime import early_step
from ds_zero.runtime.early_step import CLIPPED, NO_ROOM, OPTIONS, OWN_MASTERS, WRITTEN
from harness import ranks
from zero.models import Tiny, batch

SMALL = {"reduce_bucket_numel": 700, "persistence_threshold_numel": 20}
PLACES = ("host", "disk", "states on the disk", "masters on the disk")


def make(place: str, stage: int, *, early: bool = True, dtype: Any = torch.bfloat16, **config: Any) -> Any:
    torch.manual_seed(0)
    model = Tiny(layers=4)
    optimizer: Any = CPUAdam(model.parameters(), lr=1e-2, weight_decay=0.1)
    store: Any = HostStore(("master", "grad", "param"))
    if place != "host":
        away = {"disk": ("param", "master", "grad", "state"), "masters on the disk": ("master",)}
        store = DistantStore(away.get(place, ("state",)), in_thread=True)
        if "state" in store.away:
            optimizer = PagedOptimizer(optimizer, store, page_bytes=16384)
    options = {"accumulation_steps": 1} | config
    settings = ds_zero.ZeroConfig(param_dtype=dtype, overlap_step=early, **SMALL, **options)
    ds_zero.shard(model, optimizer, stage, config=settings, store=store)
    return model, optimizer, store


def backward(model: nn.Module, number: int) -> float:
    loss = model(*batch(number, 0))
    loss.backward()
    return loss.item()


def weights(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    found = ds_zero.full_state_dict(model)
    for name, param in model.named_parameters():
        for state in ("exp_avg", "exp_avg_sq"):
            value = ds_zero.get_full(model, param, state)
            if value is not None:
                found[f"{name}.{state}"] = value
    return found


Script = Callable[[nn.Module, Any], object]


def clipped(model: nn.Module, optimizer: Any) -> None:
    for number in range(6):
        backward(model, number)
        ds_zero.clip_grad_norm_(model, 0.3 if number % 2 else 1e9)
        optimizer.step()
        optimizer.zero_grad()


def with_another_rate(model: nn.Module, optimizer: Any) -> None:
    for number in range(5):
        backward(model, number)
        if number == 2:
            optimizer.param_groups[0]["lr"] *= 0.5
        optimizer.step()
        optimizer.zero_grad()


def without_a_step(model: nn.Module, optimizer: Any) -> None:
    for number in range(5):
        backward(model, number)
        if number != 2:
            optimizer.step()
        optimizer.zero_grad()


def with_more_backwards(model: nn.Module, optimizer: Any) -> None:
    for number in range(6):
        backward(model, number)
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()


def with_gradients_written(model: nn.Module, optimizer: Any) -> None:
    name = next(iter(dict(model.named_parameters())))
    for number in range(6):
        backward(model, number)
        if number == 1:
            ds_zero.update_full_grads(model, [name], lambda grad, _: grad * 2)
        if number == 2:
            optimizer.param_groups[0]["params"][3].grad.zero_()
        if number == 3:
            optimizer.param_groups[0]["params"][4].grad = None
        optimizer.step()
        optimizer.zero_grad()


def with_values_read_and_written(model: nn.Module, optimizer: Any) -> None:
    name = next(iter(dict(model.named_parameters())))
    for number in range(7):
        backward(model, number)
        if number == 1:
            model.seen = ds_zero.full_state_dict(model)
        if number == 2:
            model.seen_state = ds_zero.get_full(model, name, "exp_avg")
        if number == 3:
            value = ds_zero.get_full(model, name)
            assert value is not None
            ds_zero.set_full(model, name, "param", value * 0.5)
        if number == 4:
            model.saved = {key: str(value) for key, value in optimizer.state_dict()["state"].items()}
        optimizer.step()
        optimizer.zero_grad()


def with_an_evaluation(model: nn.Module, optimizer: Any) -> None:
    model.seen = []
    for number in range(4):
        backward(model, number)
        with torch.no_grad():
            model.seen.append(float(model(*batch(50, 0))))
        optimizer.step()
        optimizer.zero_grad()


def with_a_backward_that_raises(model: nn.Module, optimizer: Any) -> None:
    def fail(_: Tensor) -> None:
        raise KeyError("in backward")

    for number in range(4):
        if number == 2:
            loss = model(*batch(90, 0))
            handle = model.blocks[0].up.weight.register_hook(fail)  # others are updated by then
            with pytest.raises(KeyError):
                loss.backward()
            handle.remove()
        backward(model, number)
        optimizer.step()
        optimizer.zero_grad()


SCRIPTS: dict[Script, str | None] = {
    clipped: CLIPPED,
    with_another_rate: OPTIONS,
    without_a_step: "another backward came before the step",
    with_more_backwards: "another backward came before the step",
    with_gradients_written: WRITTEN,
    with_values_read_and_written: "values were read or written before the step",
    with_an_evaluation: None,
    with_a_backward_that_raises: "the gradients were dropped",
}


@pytest.mark.filterwarnings("ignore:the previous backward did not finish")
@pytest.mark.parametrize("script", SCRIPTS)
def test_whatever_comes_between_backward_and_step(script: Script) -> None:
    for place, stage in zip(PLACES, (1, 3, 2, 3), strict=True):
        model, optimizer, _ = make(place, stage)
        expected, other, _ = make(place, stage, early=False)
        script(model, optimizer)
        script(expected, other)
        report = ds_zero.step_overlap(model)
        assert report.kept > 0, report
        reason = SCRIPTS[script]
        assert sum(report.reasons.values()) == report.taken_back
        assert (report.reasons[reason] > 0) if reason else not report.taken_back, (place, report)
        found, wanted = weights(model, optimizer), weights(expected, other)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(found[name], value), (place, name)
        for seen in ("seen", "seen_state", "saved"):
            a, b = getattr(model, seen, None), getattr(expected, seen, None)
            if isinstance(a, dict):
                assert a.keys() == b.keys()
                assert all(torch.equal(a[n], b[n]) if isinstance(a[n], Tensor) else a[n] == b[n] for n in a)
            else:
                assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_the_pause_doubles_while_updates_are_taken_back() -> None:
    model, optimizer, _ = make("host", 2)
    early = []
    for number in range(16):
        backward(model, number)
        early.append(bool(_registry.state_of(model).early._stepped))
        ds_zero.clip_grad_norm_(model, 1e-3 if number < 14 else 1e9)
        optimizer.step()
        optimizer.zero_grad()
    assert [i for i, one in enumerate(early) if one] == [0, 2, 5, 10]
    report = ds_zero.step_overlap(model)
    assert report.taken_back == report.reasons[CLIPPED] == 4 and report.kept == 0 and report.steps == 16


@ranks(2)
def test_no_sync_tells_which_backward_is_the_last() -> None:
    for plan in ("local", "sharded"):
        results = []
        for early in (True, False):
            model, optimizer, _ = make("disk", 3, early=early, accumulation=plan, accumulation_steps=None)
            for step in range(3):
                with ds_zero.no_sync(model):
                    backward(model, 3 * step)
                    backward(model, 3 * step + 1)
                backward(model, 3 * step + 2)
                optimizer.step()
                optimizer.zero_grad()
            results.append(weights(model, optimizer))
            report = ds_zero.step_overlap(model)
            # With the local plan the first step has to learn the number of backwards.
            assert report.kept == ((3 if plan == "sharded" else 2) if early else 0), report
            ds_zero.destroy(model)
        assert all(torch.equal(results[0][n], results[1][n]) for n in results[1])


def test_what_does_not_fit_into_the_log_waits() -> None:
    results = []
    for early, limit in ((True, 40_000), (True, 0), (True, None), (False, None)):
        model, optimizer, _ = make("host", 2, early=early, undo_bytes=limit)
        for number in range(3):
            backward(model, number)
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights(model, optimizer))
        report = ds_zero.step_overlap(model)
        buckets = len([b for b in _registry.state_of(model).buckets if b.trainable])
        if not early:
            assert report.refused == "ZeroConfig(overlap_step) is False"
            continue
        if limit is None:
            assert report.buckets == buckets and not report.waited
            log = optimizer._undo_log.num_bytes + sum(
                b.full.nbytes for b in _registry.state_of(model).buckets
            )
            assert report.undo_bytes == log
        else:
            assert report.undo_bytes <= limit
            assert report.waited[NO_ROOM] == buckets - report.buckets > 0
            assert (report.buckets > 0) == (limit > 0)
    for found in results[:-1]:
        assert all(torch.equal(found[n], results[-1][n]) for n in found)


def test_values_on_a_disk_need_no_memory_for_their_log() -> None:
    model, optimizer, _ = make("disk", 3)
    for number in range(3):
        backward(model, number)
        optimizer.step()
        optimizer.zero_grad()
    report = ds_zero.step_overlap(model)
    # Only buckets below the threshold stay whole, with their parameters in memory.
    whole = sum(b.full.nbytes for b in _registry.state_of(model).buckets if b.trainable and b.whole)
    assert report.undo_bytes == whole and report.kept == 3
    assert optimizer.second_bytes == optimizer.state_bytes


def test_masters_are_stored_and_gradients_are_not_loaded_while_the_backward_runs() -> None:
    model, optimizer, store = make("disk", 3)
    for number in range(2):
        backward(model, number)
        optimizer.step()
        optimizer.zero_grad()
    store.log.clear()
    store.calls.clear()
    first = next(iter(model.parameters()))
    first.register_hook(lambda _: store.log.append(("last gradient", None)))
    backward(model, 2)
    log = [(action, key.kind if key is not None else "") for action, key in store.log]
    end = log.index(("last gradient", ""))
    for kind in ("master", "state", "param"):
        assert ("store", kind) in log[:end], kind
    assert ("load", "master") in log[:end]
    optimizer.step()
    assert not store.calls["load", "grad"]


@pytest.mark.parametrize("kind", ["lamb", "device"])
def test_optimizers_that_cannot_step_early_say_so(kind: str) -> None:
    torch.manual_seed(0)
    model = Tiny()
    made = CPULamb(model.parameters()) if kind == "lamb" else FusedAdam(model.parameters())
    config = ds_zero.ZeroConfig(param_dtype=torch.bfloat16, overlap_step=True, accumulation_steps=1)
    ds_zero.shard(model, made, 2, config=config)
    backward(model, 0)
    made.step()
    report = ds_zero.step_overlap(model)
    assert report.kept == 0
    wanted = (
        "CPULamb needs sums over whole tensors" if kind == "lamb" else "FusedAdam cannot take a step back"
    )
    assert report.refused.startswith(wanted)


def test_masters_that_are_the_parameters_wait() -> None:
    model, optimizer, _ = make("host", 2, dtype=None)
    backward(model, 0)
    optimizer.step()
    report = ds_zero.step_overlap(model)
    assert report.kept == 0 and set(report.waited) == {OWN_MASTERS}


def test_settings_that_contradict_are_refused() -> None:
    with pytest.raises(ValueError, match="overlap_step and checksums are both True"):
        ds_zero.ZeroConfig(overlap_step=True, checksums=True)
    with pytest.raises(ValueError, match="undo_bytes=-1: give a number of bytes"):
        ds_zero.ZeroConfig(undo_bytes=-1)


def test_an_update_that_fails_is_taken_back() -> None:
    model, optimizer, store = make("disk", 3)
    backward(model, 0)
    optimizer.step()
    optimizer.zero_grad()
    before = weights(model, optimizer)
    store.fails["load", "master"] = OSError("no such block")
    with pytest.raises(ds_zero.ShardStoreError, match="no such block"):
        backward(model, 1)
    assert isinstance(_registry.state_of(model).early, early_step.EarlySteps)
    found = weights(model, optimizer)
    assert all(torch.equal(found[n], before[n]) for n in before)
