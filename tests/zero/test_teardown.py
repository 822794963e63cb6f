"""Several models in one process do not meet, and what is taken apart leaves nothing behind."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import ds_zero
from ds_offload import CPUAdam, HostStore
from ds_zero import _registry
from harness import ranks
from zero.models import Tiny, batch

STAGES = [0, 1, 2, 3]


def hooks_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Every table of every module and of the optimizer that can hold a hook, and what is in it."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if "hook" in key:
                found[f"{name}.{key}"] = list(value) if isinstance(value, dict) else value
    for key, value in vars(optimizer).items():
        if "hook" in key:
            found[f"optimizer.{key}"] = list(value)
    for name, p in model.named_parameters():
        found[f"{name}.hooks"] = list(p._backward_hooks or ()), list(p._post_accumulate_grad_hooks or ())
    return found


def live_bytes() -> int:
    """Bytes of all storages that Python can reach."""
    gc.collect()
    found = {}
    for o in gc.get_objects():
        if type(o) in (Tensor, nn.Parameter):
            found[o.untyped_storage().data_ptr()] = o.untyped_storage().nbytes()
    return sum(found.values())


def one_life(stage: int, host: bool, dtype: torch.dtype | None, stop: str) -> None:
    """Shard, train, take apart; `stop` says where."""
    torch.manual_seed(0)
    model = Tiny(extras=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = CPUAdam(trained) if host else torch.optim.AdamW(trained)
    hooks = hooks_of(model, optimizer)
    store = HostStore() if host else None
    ds_zero.shard(model, optimizer, stage, config=ds_zero.ZeroConfig(param_dtype=dtype), store=store)
    scaler = ds_zero.LossScaler(model, 4.0) if dtype is not None else None
    for step in range(2):
        loss = model(*batch(step, dist.get_rank()))
        (scaler.scale(loss) if scaler is not None else loss).backward()
        if stop == "after backward" and step == 1:
            break
        optimizer.step()
        optimizer.zero_grad()
    if stop == "after forward":
        loss = model(*batch(3, dist.get_rank()))
    del loss
    if stop == "never destroyed":
        return
    ds_zero.destroy(model)
    assert hooks_of(model, optimizer) == hooks
    assert all(p.grad is None for p in model.parameters())
    assert _registry.find(model) is None
    assert _registry.find(optimizer) is None
    assert not optimizer.state
    model(*batch(0, 0)).backward()  # an ordinary model again


STOPS = ("after step", "after backward", "after forward", "never destroyed")
FEW_STOPS = {(0, STOPS[0]), (1, STOPS[1]), (2, STOPS[2]), (3, STOPS[3]), (3, STOPS[1])}


@ranks(2)
@pytest.mark.parametrize(
    ("stage", "stop"),
    [
        pytest.param(*pair, marks=() if pair in FEW_STOPS else pytest.mark.full)
        for pair in itertools.product(STAGES, STOPS)
    ],
)
def test_a_model_that_is_gone_leaves_no_memory_and_no_thread(stage: int, stop: str) -> None:
    threads = threading.active_count()
    one_life(stage, False, None, stop)  # what torch keeps of its own from the first use
    before = live_bytes()
    for host, dtype in ((False, None), (True, None), (False, torch.bfloat16)):
        one_life(stage, host, dtype, stop)
        assert live_bytes() == before
    assert threading.active_count() == threads


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_nothing_waits_for_the_garbage_collector(stage: int) -> None:
    gc.collect()
    gc.disable()
    try:
        model = Tiny()
        optimizer = torch.optim.AdamW(model.parameters())
        ds_zero.shard(model, optimizer, stage)
        model(*batch(0, dist.get_rank())).backward()
        optimizer.step()
        state = _registry.state_of(model)
        pointers = [weakref.ref(state), *(weakref.ref(b.full) for b in state.buckets)]
        pointers += [weakref.ref(s) for b in state.buckets for s in b.shards]
        del state
        ds_zero.destroy(model)
        assert all(pointer() is None for pointer in pointers)
    finally:
        gc.enable()


# --- several models


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 11), nn.Linear(11, 5)])

    def forward(self, noise: Tensor) -> Tensor:
        return self.layers[1](F.relu(self.layers[0](noise)))


class Judge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 13), nn.Linear(13, 1)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](F.relu(self.layers[0](x)))


def noise(step: int, rank: int, dim: int) -> Tensor:
    return torch.randn(4, dim, generator=torch.Generator().manual_seed(100 * step + rank))


def gan(sharded: tuple[int, int] | None, accumulation: int, plan: str | None, to_none: bool) -> list[Tensor]:
    """Two models that train against each other; the weights of both at the end. Not sharded: one process does the
    work of all ranks.
    """
    torch.manual_seed(0)
    makers, judge = Generator(), Judge()
    first = torch.optim.AdamW(makers.parameters(), lr=0.01)
    second = torch.optim.SGD(judge.parameters(), lr=0.05, momentum=0.9, foreach=True)
    size = dist.get_world_size()
    if sharded is not None:
        config = ds_zero.ZeroConfig(accumulation=plan, persistence_threshold_numel=0)  # type: ignore[arg-type]
        ds_zero.shard(makers, first, sharded[0], config=config)
        ds_zero.shard(judge, second, sharded[1], config=config)
    mine = range(size) if sharded is None else [dist.get_rank()]
    share = accumulation * (size if sharded is None else 1)
    for step in range(4):
        second.zero_grad(set_to_none=to_none)
        for micro in range(accumulation):
            for rank in mine:
                number = step * accumulation + micro
                with torch.no_grad():
                    made = makers(noise(number, rank, 6))
                loss = F.softplus(judge(made)).mean() + F.softplus(-judge(noise(number, rank, 5) + 1)).mean()
                (loss / share).backward()
        second.step()
        second.zero_grad(set_to_none=to_none)
        first.zero_grad(set_to_none=to_none)
        for rank in mine:  # gradients reach the judge, too; the next zero_grad drops them
            (
                F.softplus(-judge(makers(noise(100 + step, rank, 6)))).mean() / (share / accumulation)
            ).backward()
        first.step()
    names: list[tuple[nn.Module, str]] = [(m, n) for m in (makers, judge) for n, _ in m.named_parameters()]
    if sharded is None:
        return [m.get_parameter(n).detach() for m, n in names]
    found = [ds_zero.get_full(m, n) for m, n in names]
    return [f for f in found if f is not None]


@ranks(2)
@pytest.mark.parametrize(("accumulation", "to_none"), [(1, True), (2, True), (2, False)])
@pytest.mark.parametrize("plan", ["local", "sharded"])
@pytest.mark.parametrize("sharded", [(0, 1), (3, 2)])
def test_two_models_train_against_each_other(
    sharded: tuple[int, int], plan: str, accumulation: int, to_none: bool
) -> None:
    found = gan(sharded, accumulation, plan, to_none)
    expected = gan(None, accumulation, None, to_none)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_a_frozen_reference_model_beside_a_trained_one(stage: int) -> None:
    """As in distillation or preference training; both are sharded, one has no optimizer to speak of."""

    def build() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        judge = Judge()
        torch.manual_seed(1)
        fixed = Judge()
        return judge, fixed.requires_grad_(False)

    model, fixed = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    config = ds_zero.ZeroConfig(persistence_threshold_numel=0)
    ds_zero.shard(model, optimizer, stage, config=config)
    ds_zero.shard(fixed, torch.optim.SGD(fixed.parameters(), lr=0.0), stage, config=config)
    plain, plain_fixed = build()
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01)
    for step in range(3):
        x = noise(step, dist.get_rank(), 5)
        with torch.no_grad():
            target = fixed(x)
        F.mse_loss(model(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        for rank in range(2):
            x = noise(step, rank, 5)
            (F.mse_loss(plain(x), plain_fixed(x)) / 2).backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    for name, p in plain.named_parameters():
        found, kept = ds_zero.get_full(model, name), ds_zero.get_full(fixed, name)
        assert found is not None and kept is not None
        torch.testing.assert_close(found, p.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(kept, plain_fixed.get_parameter(name))
