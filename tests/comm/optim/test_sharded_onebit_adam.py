"""1-bit Adam with states divided among the ranks: the equations, memory, bytes, checkpoints."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from comm.optim.models import gradients, loss_of, mlp
from ds_comm.compress import Blocks, SignCompressor
from ds_comm.exchange import wire
from ds_comm.optim import CompressionOptions, OneBitAdam, ShardedOneBitAdam, merge_states
from harness import ranks

PLAIN = CompressionOptions(compressor=SignCompressor(block_numel=64), variance_floor=0.0)
FREEZE = 4


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model, dist.get_rank(), step, dtype).backward()
        optimizer.step()


def _same_on_all_ranks(model: nn.Module) -> bool:
    flat = torch.cat([p.detach().float().flatten() for p in model.parameters()])
    parts = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, flat)
    return all(torch.equal(part, parts[0]) for part in parts)


def _signs(x: Tensor) -> Tensor:
    out = torch.empty(x.numel())
    for begin, numel in Blocks.uniform(x.numel(), 64).table.tolist():
        part = x.reshape(-1)[begin : begin + numel]
        out[begin : begin + numel] = part.abs().mean() * torch.where(part < 0, -1.0, 1.0)
    return out.view_as(x)


class _Expected:
    """The class docstring's two phases for all ranks, one tensor after the other."""

    def __init__(self, model: nn.Module, size: int) -> None:
        self.params = [p.detach() for p in model.parameters()]
        self.masters = [p.clone() for p in self.params]
        self.m = [torch.zeros_like(p) for p in self.params]
        self.v = [torch.zeros_like(p) for p in self.params]
        self.local = [[torch.zeros_like(p) for p in self.params] for _ in range(size)]
        self.residuals = [[torch.zeros_like(p) for p in self.params] for _ in range(size)]
        self.steps = 0

    def step(self, grads: list[list[Tensor]], lr: float, decay: float) -> None:
        self.steps += 1
        for i, p in enumerate(self.params):
            if self.steps <= FREEZE:
                g = torch.stack([own[i] for own in grads]).mean(0)
                self.m[i] = 0.9 * self.m[i] + 0.1 * g
                self.v[i] = 0.999 * self.v[i] + 0.001 * g.square()
            else:
                sent = []
                for rank, own in enumerate(grads):
                    before = self.m[i].bfloat16() if self.steps == FREEZE + 1 else self.local[rank][i]
                    momentum = 0.9 * before.float() + 0.1 * own[i]
                    self.local[rank][i] = momentum.bfloat16()
                    value = momentum + self.residuals[rank][i]
                    sent.append(_signs(value))
                    self.residuals[rank][i] = value - sent[-1]
                self.m[i] = torch.stack(sent).mean(0)
            bias1, bias2 = 1 - 0.9**self.steps, 1 - 0.999 ** min(self.steps, FREEZE)
            self.masters[i].mul_(1 - lr * decay)
            self.masters[i].sub_(lr * (self.m[i] / bias1) / ((self.v[i] / bias2).sqrt() + 1e-8))
            if self.steps <= FREEZE:
                p.copy_(self.masters[i])
            else:
                p.add_(_signs(self.masters[i] - p))


@ranks(1, 2, 4)
def test_the_equations(world_size: int) -> None:
    model, twin = mlp(), mlp()
    optimizer = ShardedOneBitAdam(
        model.parameters(), lr=1e-2, weight_decay=0.1, freeze_step=FREEZE, compression=PLAIN
    )
    expected = _Expected(twin, world_size)
    for step in range(FREEZE + 4):
        expected.step([gradients(twin, rank, step) for rank in range(world_size)], 1e-2, 0.1)
        _train(model, optimizer, step, step + 1)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
            q.detach().copy_(p)  # or rounding errors would flip signs
    assert _same_on_all_ranks(model)


@ranks(2)
def test_memory_and_bytes(world_size: int) -> None:
    model = mlp(width=700)
    whole = OneBitAdam(mlp(width=700).parameters(), lr=1e-3, freeze_step=2)
    optimizer = ShardedOneBitAdam(model.parameters(), lr=1e-3, freeze_step=2)
    params = list(model.parameters())
    numel = sum(p.numel() for p in params)
    flags = wire.all_reduce_bytes(4 * (2 + len(params)), world_size)
    norm = wire.all_reduce_bytes(4, world_size)
    before = copy.copy(optimizer.traffic)
    _train(model, optimizer, 0, 1)
    sent = optimizer.traffic.num_bytes - before.num_bytes - flags - norm
    assert sent == pytest.approx(wire.all_reduce_bytes(4 * numel, world_size), rel=0.01)
    _train(model, optimizer, 1, 3)
    before = copy.copy(optimizer.traffic)
    _train(model, optimizer, 3, 4)
    assert optimizer.traffic.num_calls - before.num_calls == 3
    assert optimizer.traffic.num_bytes - before.num_bytes == optimizer.wire_bytes + flags
    numels = [p.numel() for p in params]
    assert optimizer.planned_bytes(numels, 2) == whole.planned_bytes(numels, 2)
    # Masters, momentum and variance of half of the elements, and the own momentum and the residual of all.
    assert optimizer.num_state_bytes == pytest.approx((12 / 2 + 2 + 4) * numel, rel=0.02)
    planned = optimizer.planned_states(2)
    assert sum(dtype.itemsize * share for dtype, share in planned.values()) == 12


@ranks(2)
def test_resuming_on_as_many_ranks_and_on_others(world_size: int) -> None:
    def make(seed: int, group: Any = None) -> tuple[nn.Module, ShardedOneBitAdam]:
        model = mlp(seed)
        return model, ShardedOneBitAdam(model.parameters(), lr=1e-2, freeze_step=FREEZE, group=group)

    model, optimizer = make(0)
    for saved_at in (FREEZE - 1, FREEZE + 3):
        _train(model, optimizer, saved_at - 3, saved_at)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        ahead, ahead_optimizer = make(1)
        ahead.load_state_dict(saved[0])
        ahead_optimizer.load_state_dict(saved[1])
        _train(model, optimizer, saved_at, saved_at + 3)
        _train(ahead, ahead_optimizer, saved_at, saved_at + 3)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), ahead.parameters(), strict=True))
    states: list[Any] = [None, None]
    dist.all_gather_object(states, optimizer.state_dict())
    with pytest.raises(ValueError, match="merge the states of all ranks first"):
        optimizer.load_state_dict(states[1 - dist.get_rank()])
    with pytest.raises(ValueError, match="given were those of ranks"):
        merge_states(states[:1])
    merged = merge_states(states)
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    single, one = make(2, alone)
    single.load_state_dict(model.state_dict())
    one.load_state_dict(merged)
    restored = one.state_dict()["sharded"]
    for name in ("master", "exp_avg", "exp_avg_sq"):
        assert torch.equal(restored[name], torch.cat([s["sharded"][name] for s in states]))
    both = torch.stack([s["sharded"]["worker"] for s in states]).mean(0)
    assert torch.equal(restored["worker"], both)
    _train(single, one, 20, 22)
    dist.destroy_process_group(alone)


@ranks(2)
def test_what_training_needs(world_size: int) -> None:
    # bf16 parameters, whose masters keep more bits; ranks stay equal. A frozen and an unused parameter.
    model = mlp(dtype=torch.bfloat16)
    unused = nn.Parameter(torch.ones(70, dtype=torch.bfloat16))
    frozen = nn.Parameter(torch.ones(70, dtype=torch.bfloat16), requires_grad=False)
    groups = [{"params": [*model.parameters(), frozen]}, {"params": [unused], "weight_decay": 0.5}]
    optimizer = ShardedOneBitAdam(groups, lr=1e-2, freeze_step=FREEZE, max_grad_norm=0.05)
    first = sum(loss_of(model, 0, step, torch.bfloat16).item() for step in range(50, 60))
    _train(model, optimizer, 0, FREEZE)
    assert torch.equal(unused.detach(), torch.ones_like(unused))
    _train(model, optimizer, FREEZE, 40)
    assert _same_on_all_ranks(model)
    assert torch.equal(frozen.detach(), torch.ones_like(frozen))
    last = sum(loss_of(model, 0, step, torch.bfloat16).item() for step in range(50, 60))
    assert last < 0.8 * first
    assert optimizer.report is not None
    assert optimizer.report.clip_factor < 1.0
    # An overflow on one rank at the boundary of the phases is skipped on all, and training goes on.
    model = mlp()
    optimizer = ShardedOneBitAdam(model.parameters(), lr=1e-2, freeze_step=2)
    _train(model, optimizer, 0, 1)
    with torch.no_grad():
        model[0].bias.fill_(7.0)  # somebody loads weights: masters follow
    _train(model, optimizer, 1, 2)
    assert float((model[0].bias.detach() - 7.0).abs().max()) < 0.1
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["sharded"]))
    optimizer.zero_grad()
    (loss_of(model, dist.get_rank(), 2) * (float("inf") if dist.get_rank() else 1.0)).backward()
    optimizer.step()
    assert optimizer.report is not None
    assert optimizer.report.skipped
    after = (model.state_dict(), optimizer.state_dict()["sharded"])
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(v, new[k]) for k, v in old.items() if isinstance(v, Tensor))
    optimizer.grad_scale = 16.0
    optimizer.zero_grad()
    (16.0 * loss_of(model, dist.get_rank(), 3)).backward()
    optimizer.step()
    assert not optimizer.report.skipped
    assert _same_on_all_ranks(model)
    with pytest.raises(RuntimeError, match="cannot be added after the first step"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    next(model.parameters()).requires_grad_(False)
    with pytest.raises(RuntimeError, match="have changed since the first step"):
        optimizer.step()
