"""1-bit LAMB with states divided among the ranks: the equations, memory, bytes, checkpoints."""

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
from ds_comm.optim import CompressionOptions, OneBitLamb, ShardedOneBitLamb, merge_states
from harness import ranks

PLAIN = CompressionOptions(compressor=SignCompressor(block_numel=64), variance_floor=0.0)
FREEZE, DECAY, LR = 4, 0.1, 1e-2


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model, dist.get_rank(), step).backward()
        optimizer.step()


def _signs(x: Tensor) -> Tensor:
    out = torch.empty(x.numel())
    for begin, numel in Blocks.uniform(x.numel(), 64).table.tolist():
        part = x.reshape(-1)[begin : begin + numel]
        out[begin : begin + numel] = part.abs().mean() * torch.where(part < 0, -1.0, 1.0)
    return out.view_as(x)


class _Expected:
    """Both phases for all ranks, one whole tensor after the other (docs/notes/onebit.md)."""

    def __init__(self, model: nn.Module, size: int) -> None:
        self.params = [p.detach() for p in model.parameters()]
        self.masters = [p.clone() for p in self.params]
        self.m, self.v, self.fresh = ([torch.zeros_like(p) for p in self.params] for _ in range(3))
        self.local = [[torch.zeros_like(p) for p in self.params] for _ in range(size)]
        self.residuals = [[torch.zeros_like(p) for p in self.params] for _ in range(size)]
        self.coeff: list[float | None] = [None] * len(self.params)
        self.factor = [1.0] * len(self.params)
        self.steps = 0

    def step(self, grads: list[list[Tensor]]) -> None:
        self.steps += 1
        for i, p in enumerate(self.params):
            (self._dense if self.steps <= FREEZE else self._compressed)(i, p, [own[i] for own in grads])

    def _update(self, i: int) -> tuple[Tensor, Tensor]:
        bias1, bias2 = 1 - 0.9**self.steps, 1 - 0.999 ** min(self.steps, FREEZE)
        direction = (self.m[i] / bias1) / ((self.v[i] / bias2).sqrt() + 1e-8)
        return direction, direction + DECAY * self.masters[i]

    def _dense(self, i: int, p: Tensor, grads: list[Tensor]) -> None:
        g = torch.stack(grads).mean(0)
        self.m[i] = 0.9 * self.m[i] + 0.1 * g
        self.v[i] = 0.999 * self.v[i] + 0.001 * g.square()
        _, change = self._update(i)
        ratio = min(max(float(self.masters[i].norm() / change.norm()), 0.01), 10.0)
        before = self.coeff[i]
        self.coeff[i] = ratio if before is None else 0.9 * before + 0.1 * ratio
        self.masters[i].sub_(LR * ratio * change)
        self.fresh[i] = self.v[i].clone()
        p.copy_(self.masters[i])

    def _compressed(self, i: int, p: Tensor, grads: list[Tensor]) -> None:
        sent = []
        for rank, own in enumerate(grads):
            before = self.m[i].bfloat16() if self.steps == FREEZE + 1 else self.local[rank][i]
            momentum = 0.9 * before.float() + 0.1 * own
            self.local[rank][i] = momentum.bfloat16()
            value = momentum + self.residuals[rank][i]
            sent.append(_signs(value))
            self.residuals[rank][i] = value - sent[-1]
        averaged = torch.stack(sent).mean(0)
        g = (averaged - 0.9 * self.m[i]) / 0.1
        self.m[i] = averaged
        self.fresh[i] = 0.999 * self.fresh[i] + 0.001 * g.square()
        direction, change = self._update(i)
        factor = float(((self.v[i].sqrt() + 1e-8) / (self.fresh[i].sqrt() + 1e-8)).max())
        share = min(1.0, float(direction.norm() / change.norm()))
        factor = min(max(factor * share + 1 - share, 0.5), 4.0)
        factor = min(max(factor, 0.9 * self.factor[i]), 1.1 * self.factor[i])
        self.factor[i] = factor
        coeff = self.coeff[i]
        assert coeff is not None
        self.masters[i].sub_(LR * coeff * factor * change)
        p.add_(_signs(self.masters[i] - p))


@ranks(1, 3)
def test_the_equations(world_size: int) -> None:
    model, twin, whole = mlp(), mlp(), mlp()
    options: dict[str, Any] = {"lr": LR, "weight_decay": DECAY, "freeze_step": FREEZE, "compression": PLAIN}
    optimizer = ShardedOneBitLamb(model.parameters(), **options)
    undivided = OneBitLamb(whole.parameters(), **options)
    expected = _Expected(twin, world_size)
    for step in range(FREEZE + 4):
        expected.step([gradients(twin, rank, step) for rank in range(world_size)])
        _train(model, optimizer, step, step + 1)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
            q.detach().copy_(p)  # or rounding errors would flip signs
        if (
            step < FREEZE
        ):  # both phases of the same optimizer, and the first one of the one that is not divided
            _train(whole, undivided, step, step + 1)
            for p, q in zip(model.parameters(), whole.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    parts = [torch.empty_like(flat) for _ in range(world_size)]
    dist.all_gather(parts, flat)
    assert all(torch.equal(part, flat) for part in parts)


@ranks(2)
def test_memory_and_bytes(world_size: int) -> None:
    model = mlp(width=300)
    optimizer = ShardedOneBitLamb(model.parameters(), lr=1e-3, freeze_step=2)
    params = list(model.parameters())
    numels = [p.numel() for p in params]
    _train(model, optimizer, 0, 3)
    before = copy.copy(optimizer.traffic)
    _train(model, optimizer, 3, 4)
    flags = wire.all_reduce_bytes(4 * (2 + len(params)), world_size)
    sent = optimizer.traffic.num_bytes - before.num_bytes - flags
    assert sent == optimizer.wire_bytes + wire.all_reduce_bytes(24 * len(params), world_size)
    if dist.get_rank() == 0:
        assert sent == optimizer.planned_bytes(numels, 2)
    assert optimizer.traffic.num_calls - before.num_calls == 5
    # Masters, momentum and two variances of half of the elements, and the own momentum and the residual of all.
    assert optimizer.num_state_bytes == pytest.approx((16 / 2 + 2 + 4) * sum(numels), rel=0.03)
    assert sum(dtype.itemsize * share for dtype, share in optimizer.planned_states(2).values()) == 14


@ranks(2)
def test_resuming_on_as_many_ranks_and_on_others() -> None:
    def make(seed: int, group: Any = None) -> tuple[nn.Module, ShardedOneBitLamb]:
        model = mlp(seed)
        return model, ShardedOneBitLamb(model.parameters(), lr=LR, freeze_step=FREEZE, group=group)

    model, optimizer = make(0)
    _train(model, optimizer, 0, FREEZE + 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    ahead, ahead_optimizer = make(1)
    ahead.load_state_dict(saved[0])
    ahead_optimizer.load_state_dict(saved[1])
    states: list[Any] = [None, None]
    dist.all_gather_object(states, optimizer.state_dict())
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    single, one = make(2, alone)
    single.load_state_dict(model.state_dict())
    one.load_state_dict(merge_states(states))
    restored = one.state_dict()["sharded"]
    for name in ("master", "exp_avg", "exp_avg_sq", "fresh"):
        assert torch.equal(restored[name], torch.cat([s["sharded"][name] for s in states]))
    assert restored["numbers"] == states[0]["sharded"]["numbers"] == states[1]["sharded"]["numbers"]
    _train(model, optimizer, FREEZE + 3, FREEZE + 6)
    _train(ahead, ahead_optimizer, FREEZE + 3, FREEZE + 6)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), ahead.parameters(), strict=True))
    adam = {key: value for key, value in states[dist.get_rank()]["sharded"].items() if key != "fresh"}
    with pytest.raises(ValueError, match="lack 'fresh': they are those of another optimizer"):
        optimizer.load_residuals([adam])
    dist.destroy_process_group(alone)
