"""Every stage trains bitwise like a plain loop: the claim of docs/benchmarks/parity.md."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

import ds_zero
from ds_offload import CPUAdam, HostStore
from harness import ranks
from zero.models import batch
from zero.parity import Job, Result, assert_same, plain, sharded

STAGES = [0, 1, 2, 3]


def torch_adamw(params: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def torch_sgd(params: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(params, lr=1e-1, momentum=0.9, foreach=True)


def cpu_adam(params: Iterable[nn.Parameter]) -> Optimizer:
    return CPUAdam(params, lr=1e-2, weight_decay=0.1)


OPTIMIZERS = {"adamw": torch_adamw, "sgd": torch_sgd, "cpuadam": cpu_adam}


def store_for(optimizer: str) -> Any:
    return HostStore() if optimizer == "cpuadam" else None


def half(*values: tuple[Any, ...]) -> list[Any]:
    """All combinations; every second one, in which each two values meet, runs by default."""
    rows = itertools.product(*(enumerate(row) for row in values))
    return [
        pytest.param(*(v for _, v in row), marks=pytest.mark.full if sum(i for i, _ in row) % 2 else ())
        for row in rows
    ]


@ranks(2)
@pytest.mark.parametrize(
    ("plan", "accumulation", "clip", "optimizer"),
    half(("local", "sharded"), (1, 4), (None, 0.3), ("adamw", "cpuadam")),
)
def test_stages_equal_plain_pytorch_over_20_steps(
    plan: str, accumulation: int, clip: float | None, optimizer: str
) -> None:
    job = Job(steps=20, accumulation=accumulation, clip=clip, optimizer=OPTIMIZERS[optimizer])
    expected = plain(job, plan)
    for stage in STAGES:
        assert_same(sharded(job, stage, store=store_for(optimizer), accumulation=plan), expected)


@ranks(2)
@pytest.mark.parametrize(
    ("accumulation", "clip", "optimizer"), half((1, 4), (None, 0.3), ("adamw", "cpuadam"))
)
def test_local_plan_equals_ddp(accumulation: int, clip: float | None, optimizer: str) -> None:
    job = Job(steps=20, accumulation=accumulation, clip=clip, optimizer=OPTIMIZERS[optimizer])
    expected = ddp(job, ds_norm=True)
    for stage in STAGES:
        assert_same(sharded(job, stage, store=store_for(optimizer), accumulation="local"), expected)


@ranks(2)
def test_losses_agree_with_torch_clipping_to_1e_5() -> None:
    job = Job(steps=20, accumulation=4, clip=0.3)
    expected = ddp(job, ds_norm=False)
    for stage in STAGES:
        found = sharded(job, stage, accumulation="local")
        torch.testing.assert_close(
            torch.tensor(found.losses), torch.tensor(expected.losses), rtol=1e-5, atol=0
        )


def ddp(job: Job, *, ds_norm: bool) -> Result:
    """`torch.nn.parallel.DistributedDataParallel`, with `no_sync` while accumulating."""
    model = job.build()
    optimizer = job.optimizer(model.parameters())
    wrapped = nn.parallel.DistributedDataParallel(model)
    losses, norms = [], []
    for step in range(job.steps):
        for micro in range(job.accumulation):
            last = micro == job.accumulation - 1
            wrapped.require_backward_grad_sync = last
            loss = wrapped(*batch(step * job.accumulation + micro, dist.get_rank()))
            (loss / job.accumulation).backward()
            losses.append(loss.item())
        if job.clip is not None and ds_norm:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            norms.append(ds_zero.total_norm(grads).item())
            factor = torch.clamp(job.clip / (torch.tensor(norms[-1]) + 1e-6), max=1.0)
            torch._foreach_mul_(grads, factor)
        elif job.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.clip)
        optimizer.step()
        optimizer.zero_grad()
    return Result(losses, norms, {k: v.detach().clone() for k, v in model.state_dict().items()})


COVERING = [
    # ranks are given by the decorator; each row names stage, plan, accumulation, clip, model, optimizer, config
    (0, "sharded", 3, 0.3, {"extras": True}, "sgd", {"reduce_bucket_numel": 700}),
    (1, "local", 3, None, {"tied": True}, "cpuadam", {"overlap_publish": True}),
    (1, "sharded", 1, 0.3, {"extras": True, "tied": True}, "adamw", {"reduce_bucket_numel": 100}),
    (2, "local", 1, 0.3, {"extras": True}, "cpuadam", {"reduce_bucket_numel": 700}),
    (2, "sharded", 3, None, {"tied": True}, "sgd", {"overlap_publish": True, "reduce_bucket_numel": 100}),
    (3, "local", 3, 0.3, {"extras": True, "tied": True}, "sgd", {"persistence_threshold_numel": 0}),
    (3, "sharded", 1, None, {"extras": True}, "cpuadam", {"prefetch": False}),
    (3, "sharded", 3, 0.3, {"tied": True}, "adamw", {"persistence_threshold_numel": 100}),
]


@ranks(1, 2, 3, 4)
@pytest.mark.parametrize("row", range(len(COVERING)))
def test_combinations(row: int) -> None:
    stage, plan, accumulation, clip, model, optimizer, config = COVERING[row]
    _compare(stage, plan, accumulation, clip, model, optimizer, config)


@pytest.mark.full
@ranks(2, 4)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "cpuadam"])
@pytest.mark.parametrize("model", [{}, {"tied": True}, {"extras": True}, {"extras": True, "tied": True}])
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("plan", ["local", "sharded"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_combination(
    stage: int, plan: str, accumulation: int, clip: float | None, model: dict[str, Any], optimizer: str
) -> None:
    for config in (
        {},
        {"reduce_bucket_numel": 100},
        {"persistence_threshold_numel": 0},
        {"overlap_publish": True},
    ):
        _compare(stage, plan, accumulation, clip, model, optimizer, config)


def _compare(
    stage: int,
    plan: str,
    accumulation: int,
    clip: float | None,
    model: dict[str, Any],
    optimizer: str,
    config: dict[str, Any],
) -> None:
    job = Job(steps=4, accumulation=accumulation, clip=clip, model=model, optimizer=OPTIMIZERS[optimizer])
    found = sharded(job, stage, store=store_for(optimizer), accumulation=plan, **config)
    expected = plain(job, plan)
    if dist.get_world_size() in (1, 2, 4):
        assert_same(found, expected)
    else:  # dividing by three before or after the sum rounds differently
        torch.testing.assert_close(found.losses, expected.losses, rtol=1e-5, atol=1e-6)


@ranks(2, 4)
@pytest.mark.parametrize("plan", ["local", "sharded"])
@pytest.mark.parametrize("optimizer", ["adamw", "cpuadam"])
def test_stages_agree_bitwise_in_bf16(plan: str, optimizer: str) -> None:
    job = Job(
        steps=6,
        accumulation=2,
        clip=0.3,
        dtype=torch.bfloat16,
        model={"extras": True},
        optimizer=OPTIMIZERS[optimizer],
    )
    first = sharded(job, 0, store=store_for(optimizer), accumulation=plan)
    for stage in (1, 2, 3):
        assert_same(sharded(job, stage, store=store_for(optimizer), accumulation=plan), first)
    exact = sharded(
        Job(steps=6, accumulation=2, clip=0.3, model={"extras": True}, optimizer=OPTIMIZERS[optimizer]),
        0,
        accumulation=plan,
    )
    torch.testing.assert_close(first.losses, exact.losses, rtol=0.05, atol=0)
    assert first.losses != exact.losses, "bf16 must really compute in bf16"


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_bf16_masters_keep_the_values_from_before_the_cast(stage: int) -> None:
    job = Job(steps=0, dtype=torch.bfloat16)
    weights = sharded(job, stage).weights
    original: dict[str, Tensor] = job.build().state_dict()
    assert all(torch.equal(weights[k], original[k]) for k in original)
