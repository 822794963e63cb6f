"""Local SGD and DiLoCo: the equations, and everything around them that training needs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from comm.optim.models import gradients, loss_of, mlp
from ds_comm.compress import IntCompressor, TopKCompressor
from ds_comm.exchange import wire
from ds_comm.optim import CompressionOptions, LocalSGD, OneBitAdam, merge_states, nesterov
from harness import ranks

LR, EVERY, START = 0.05, 3, 2


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model, dist.get_rank(), step).backward()
        optimizer.step()


def _same(model: nn.Module) -> bool:
    flat = torch.cat([p.detach().float().flatten() for p in model.parameters()])
    parts = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, flat)
    return all(torch.equal(part, parts[0]) for part in parts)


def _expected(steps: int, outer_lr: float, momentum: float, size: int) -> list[list[Tensor]]:
    """Parameters of every rank, all ranks in one process: algorithm 1 of the paper with an inner SGD."""
    models = [mlp() for _ in range(size)]
    anchors = [p.detach().clone() for p in models[0].parameters()]
    velocity = [torch.zeros_like(a) for a in anchors]
    for step in range(steps):
        grads = [gradients(model, rank, step) for rank, model in enumerate(models)]
        mean = [torch.stack(parts).mean(0) for parts in zip(*grads, strict=True)]
        for rank, model in enumerate(models):
            for p, g in zip(model.parameters(), mean if step < START else grads[rank], strict=True):
                p.detach().sub_(LR * g)
        if step + 1 == START:
            anchors = [p.detach().clone() for p in models[0].parameters()]
        if step >= START and (step + 1 - START) % EVERY == 0:
            for i, anchor in enumerate(anchors):
                change = anchor - torch.stack([list(m.parameters())[i].detach() for m in models]).mean(0)
                velocity[i] = momentum * velocity[i] + change
                anchor -= outer_lr * (change + momentum * velocity[i])
                for model in models:
                    list(model.parameters())[i].detach().copy_(anchor)
    return [[p.detach() for p in model.parameters()] for model in models]


@ranks(1, 2)
def test_the_equations(world_size: int) -> None:
    outers: list[tuple[Any, float, float]] = [
        (None, 0.7, 0.9),
        (lambda anchors: torch.optim.SGD(anchors, lr=1.0), 1.0, 0.0),
    ]
    for outer, outer_lr, momentum in outers:
        model = mlp()
        inner = torch.optim.SGD(model.parameters(), lr=LR)
        optimizer = LocalSGD(inner, outer, EVERY, start_step=START)
        for step in range(START + 2 * EVERY + 1):
            _train(model, optimizer, step, step + 1)
            own = _expected(step + 1, outer_lr, momentum, world_size)[dist.get_rank()]
            for p, q in zip(model.parameters(), own, strict=True):
                torch.testing.assert_close(p.detach(), q, rtol=1e-4, atol=1e-6)
            done = step + 1 - START
            assert optimizer.synchronised == (done <= 0 or done % EVERY == 0)
            assert _same(model) == (optimizer.synchronised or world_size == 1)
        optimizer.sync()
        assert optimizer.synchronised
        assert _same(model)


@ranks(2)
def test_clipping_schedules_and_overflows(world_size: int) -> None:
    model, twin = mlp(), mlp()
    optimizer = LocalSGD(torch.optim.SGD(model.parameters(), lr=1.0), sync_every=4, max_grad_norm=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1)
    grads = gradients(twin, dist.get_rank(), 0)
    optimizer.grad_scale = 8.0
    (8.0 * loss_of(model, dist.get_rank(), 0)).backward()
    optimizer.step()
    schedule.step()
    norm = float(torch.cat([g.flatten() for g in grads]).norm())
    assert optimizer.report is not None
    assert optimizer.report.grad_norm == pytest.approx(norm, rel=1e-4)
    for p, q, g in zip(model.parameters(), twin.parameters(), grads, strict=True):
        torch.testing.assert_close(p.detach(), q.detach() - 0.1 * g * 0.01 / norm, rtol=1e-3, atol=1e-6)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    bad = float("inf") if dist.get_rank() == 1 else 1.0
    (bad * loss_of(model, dist.get_rank(), 1)).backward()
    optimizer.step()
    assert optimizer.report.skipped == (dist.get_rank() == 1)
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q) == (dist.get_rank() == 1)
    # In the first steps, which are averaged, all ranks skip.
    model = mlp()
    optimizer = LocalSGD(torch.optim.SGD(model.parameters(), lr=1.0), start_step=3)
    (bad * loss_of(model, dist.get_rank(), 1)).backward()
    optimizer.step()
    assert optimizer.report is not None
    assert optimizer.report.skipped
    assert _same(model)


def _compressed(compressor: Any) -> CompressionOptions:
    return CompressionOptions(compressor=compressor)


@ranks(2)
def test_compressed_outer_gradients_and_their_bytes(world_size: int) -> None:
    flags = wire.all_reduce_bytes(4 * world_size, world_size)
    dense = 0
    for options in (
        None,
        _compressed(IntCompressor(bits=8)),
        _compressed(TopKCompressor(block_numel=256, kept=8)),
    ):
        model = mlp(width=100)
        inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
        optimizer = LocalSGD(inner, nesterov(0.7, 0.5), 4, compression=options)
        first = sum(loss_of(model, dist.get_rank(), step).item() for step in range(100, 104))
        _train(model, optimizer, 0, 1)
        before = copy.copy(optimizer.traffic)
        _train(model, optimizer, 1, 4)
        assert _same(model)
        assert optimizer.traffic.num_bytes - before.num_bytes == optimizer.wire_bytes + flags
        numels = [p.numel() for p in model.parameters()]
        assert optimizer.planned_bytes(numels, 2) == -(-optimizer.wire_bytes // 4)
        if options is None:
            dense = optimizer.wire_bytes
        elif isinstance(options.compressor, TopKCompressor):
            assert optimizer.wire_bytes < dense / 25  # 32 of 32 bits of 8 in 256 elements
            residual = optimizer.residuals()["feedback"]["worker"]
            assert float(residual.abs().sum()) > 0
        _train(model, optimizer, 4, 60)
        last = sum(loss_of(model, dist.get_rank(), step).item() for step in range(100, 104))
        assert last < 0.6 * first, (options, first, last)


@ranks(2)
def test_training_continues_exactly_from_a_state(world_size: int) -> None:
    sparse = _compressed(TopKCompressor(block_numel=128, kept=16))

    def make(seed: int) -> tuple[nn.Module, LocalSGD]:
        model = mlp(seed)
        return model, LocalSGD(torch.optim.AdamW(model.parameters(), lr=1e-2), None, 4, compression=sparse)

    model, optimizer = make(0)
    _train(model, optimizer, 0, 10)  # two steps after an outer step
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    _train(model, optimizer, 10, 20)
    other, resumed = make(1)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert not resumed.synchronised
    _train(other, resumed, 10, 20)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    states: list[Any] = [None, None]
    dist.all_gather_object(states, saved[1])
    with pytest.raises(ValueError, match="2 steps after an outer step"):
        merge_states(states)
    with pytest.raises(ValueError, match=r"is that of rank \d of 2, but this is rank"):
        resumed.load_state_dict(states[1 - dist.get_rank()])
    dist.all_gather_object(states, optimizer.state_dict())
    merged = merge_states(states)
    mean = torch.stack([state["state"][0]["exp_avg"] for state in states]).mean(0)
    assert torch.equal(merged["state"][0]["exp_avg"], mean)
    # On one rank: the worker's residual is the mean, the server's is whole.
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    third = mlp(2)
    third.load_state_dict(model.state_dict())
    one = LocalSGD(torch.optim.AdamW(third.parameters(), lr=1e-2), None, 4, group=alone, compression=sparse)
    one.load_state_dict(merged)
    _train(third, one, 20, 24)
    assert one.synchronised
    dist.destroy_process_group(alone)


@ranks(2)
def test_misuse_is_named_on_every_rank(world_size: int) -> None:
    model = mlp()
    with pytest.raises(ValueError, match="inner optimizer OneBitAdam averages gradients"):
        LocalSGD(OneBitAdam(model.parameters(), freeze_step=1))
    plain: Callable[[], torch.optim.Optimizer] = lambda: torch.optim.SGD(model.parameters(), lr=0.01)  # noqa: E731
    for wrong in ({"sync_every": 0}, {"start_step": -1}, {"max_grad_norm": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LocalSGD(plain(), **wrong)  # type: ignore[arg-type]
    optimizer = LocalSGD(plain(), sync_every=2)
    with pytest.raises(ValueError, match="no outer state"):
        optimizer.load_state_dict(plain().state_dict())
    _train(model, optimizer, 0, 1)
    extra = nn.Parameter(torch.full((5,), float(dist.get_rank())))
    with pytest.raises(RuntimeError, match=r"call sync\(\) before add_param_group"):
        optimizer.add_param_group({"params": [extra]})
    optimizer.sync()
    optimizer.add_param_group({"params": [extra], "lr": 0.1})
    assert len(optimizer.inner.param_groups) == 2
    _train(model, optimizer, 1, 3)
    assert torch.equal(extra.detach(), torch.zeros(5))  # the first rank's values
    with torch.no_grad():
        if dist.get_rank() == 1:
            extra.fill_(float("nan"))
    optimizer.zero_grad()
    optimizer.step()
    with pytest.raises(FloatingPointError, match=r"rank\(s\) \[1\] are not finite"):
        optimizer.step()


@ranks(2)
def test_anchors_of_16_bit_parameters_keep_their_bits(world_size: int) -> None:
    model = mlp(dtype=torch.bfloat16)
    optimizer = LocalSGD(torch.optim.SGD(model.parameters(), lr=0.01), sync_every=1)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, dist.get_rank(), step, torch.bfloat16).backward()
        optimizer.step()
    anchors = optimizer.residuals()["anchors"]
    assert not torch.equal(anchors, anchors.bfloat16().float())
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)  # somebody loads weights between two outer steps
    optimizer.zero_grad()
    optimizer.step()
    assert all(bool(((p - 0.5).abs() < 0.2).all()) for p in model.parameters())
