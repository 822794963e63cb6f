"""Reduce-scatter with error feedback: its equations, its resets, its state, and plain loops with ds_zero and FSDP2."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import ds_comm
import ds_zero
from comm.optim.models import loss_of, mlp
from ds_comm.compress import Blocks, IntCompressor
from ds_comm.exchange import Hierarchy, LoCoReduceScatter, QuantizedReduceScatter
from harness import ranks

NUMEL = 600  # not a multiple of the blocks


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def _gradients(step: int, size: int) -> list[Tensor]:
    """Of all ranks, a row for each receiver."""
    return [
        torch.randn(size, NUMEL, generator=torch.Generator().manual_seed(10 * step + r)) for r in range(size)
    ]


def _rounded(x: Tensor) -> Tensor:
    compressor, blocks = IntCompressor(bits=4), Blocks.uniform(NUMEL, 256)
    blocks = Blocks(table=blocks.table, numel=NUMEL)
    payload, out = compressor.payload_like(blocks, x.device), torch.empty(NUMEL)
    compressor.encode(x, payload, blocks)
    compressor.decode(payload, out, blocks)
    return out


@ranks(3)
def test_the_equations() -> None:
    size, me = dist.get_world_size(), dist.get_rank()
    loco = LoCoReduceScatter(err_beta=0.7, reset_steps=4)
    errors = [torch.zeros(size, NUMEL) for _ in range(size)]
    for step in range(6):
        grads = _gradients(step, size)
        if step == 4:
            errors = [torch.zeros(size, NUMEL) for _ in range(size)]
        expected = torch.zeros(NUMEL)
        for rank in range(size):
            for row in range(size):
                sent = grads[rank][row] + errors[rank][row]
                lost = sent - _rounded(sent)
                if row == me:
                    expected += _rounded(sent)
                errors[rank][row] = 0.7 * errors[rank][row] + 0.3 * lost
        out = torch.empty(NUMEL)
        loco(out, grads[me].view(-1), _world())
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert loco.traffic.num_bytes == 6 * loco.sent_bytes(size * NUMEL, torch.float32, size)
    held = loco.state_dict()["buckets"][""]["hops"]
    assert held[1] is None
    assert held[0].nbytes == loco.state_bytes(size * NUMEL, torch.float32, size)


def _drift(reduce: QuantizedReduceScatter, steps: int) -> float:
    """Root mean square of what is missing from the sum of all results."""
    size, me = dist.get_world_size(), dist.get_rank()
    total = torch.zeros(NUMEL)
    for step in range(steps):
        grads = _gradients(step, size)
        out = torch.empty(NUMEL)
        reduce(out, grads[me].view(-1), _world())
        total += out - torch.stack(grads).sum(0)[me]
    return float(total.square().mean().sqrt())


@ranks(4)
def test_errors_do_not_add_up_in_one_and_two_hops() -> None:
    for grid in (None, Hierarchy.of(2)):
        nearest = IntCompressor(bits=4)
        without = _drift(QuantizedReduceScatter(nearest, grid), 40)
        fed_back = LoCoReduceScatter(hierarchy=grid, err_beta=0.0)
        assert _drift(fed_back, 40) < 0.4 * without
        if grid is not None:
            first, second = fed_back.state_dict()["buckets"][""]["hops"]
            assert (first.numel(), second.numel()) == (4 * NUMEL, 2 * NUMEL)
            planned = LoCoReduceScatter(local_size=2)
            assert planned.state_bytes(4 * NUMEL, torch.float32, 4) == first.nbytes + second.nbytes
            grid.destroy()


@ranks(2)
def test_a_step_that_is_skipped_leaves_no_error_that_is_not_finite() -> None:
    loco, out = LoCoReduceScatter(), torch.empty(NUMEL)
    bad = torch.ones(2 * NUMEL)
    bad[7] = float("inf")
    loco(out, bad, _world())
    loco(out, torch.ones(2 * NUMEL), _world())
    torch.testing.assert_close(out, torch.full((NUMEL,), 2.0), rtol=0.1, atol=0.0)


@ranks(2)
def test_a_state_that_was_saved_continues_exactly() -> None:
    grads, out, again = (torch.randn(2 * NUMEL), torch.empty(NUMEL), torch.empty(NUMEL))
    loco, loaded = LoCoReduceScatter(), LoCoReduceScatter()
    for _ in range(3):
        loco(out, grads, _world())
    loaded.load_state_dict(loco.state_dict())
    loco(out, grads, _world())
    loaded(again, grads, _world())
    assert torch.equal(out, again)
    with pytest.raises(ValueError, match="600 gradients, but 1200 in the reductions before"):
        loco(torch.empty(300), grads[:NUMEL], _world())


def test_bad_arguments() -> None:
    for wrong, text in (
        ({"err_beta": 1.0}, "err_beta must lie in"),
        ({"reset_steps": 0}, "reset_steps must be at least 1"),
        ({"residual_dtype": torch.float16}, "residual_dtype must be"),
    ):
        with pytest.raises(ValueError, match=text):
            LoCoReduceScatter(**wrong)  # type: ignore[arg-type]


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 40) -> list[float]:
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, dist.get_rank(), step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _sharded(reduce: object | None) -> list[float]:
    model = mlp(width=64)
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer = ds_zero.shard(model, adam, stage=2, comm=ds_comm.collectives(reduce_scatter=reduce))
    losses = _trained(model, optimizer)
    ds_zero.destroy(model)
    return losses


def _mean(losses: Sequence[float]) -> float:
    return sum(losses[-10:]) / 10


@ranks(2)
def test_in_plain_loops_with_ds_zero_and_fsdp2() -> None:
    exact = _sharded(None)
    loco = LoCoReduceScatter()
    fed_back = _sharded(loco)
    assert fed_back != exact
    assert _mean(fed_back) == pytest.approx(_mean(exact), rel=0.05)
    assert all(name for name in loco.state_dict())  # one set of errors for each bucket
    model = mlp(width=64)
    mesh = init_device_mesh("cpu", (2,))
    for module in (*(m for m in model if isinstance(m, nn.Linear)), model):
        fully_shard(module, mesh=mesh)
        assert isinstance(module, FSDPModule)
        module.set_custom_reduce_scatter(LoCoReduceScatter())  # type: ignore[arg-type]
    losses = _trained(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    assert _mean(losses) == pytest.approx(_mean(exact), rel=0.05)
