"""Quantised all-gather and reduce-scatter: alone, and inside of FSDP2 and DistributedDataParallel."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from comm.optim.models import loss_of, mlp
from ds_comm.compress import IntCompressor
from ds_comm.exchange import CompressedHook, Hierarchy, QuantizedAllGather, QuantizedReduceScatter, wire
from harness import ranks


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


@ranks(2, 3)
@pytest.mark.parametrize("numel", [1000, 5])
def test_gather(numel: int, world_size: int) -> None:
    parts = [torch.randn(numel, generator=torch.Generator().manual_seed(r)) for r in range(world_size)]
    gather = QuantizedAllGather()
    out = torch.empty(world_size * numel)
    assert gather(out, parts[dist.get_rank()], _world()) is None
    for part, expected in zip(out.chunk(world_size), parts, strict=True):
        assert 0 < (part - expected).abs().max() <= expected.abs().max() / 127 / 2 * 1.001
    # All ranks got the same bits.
    others = [torch.empty_like(out) for _ in range(world_size)]
    dist.all_gather(others, out)
    assert all(torch.equal(other, out) for other in others)
    assert gather.traffic.num_bytes == gather.wire_bytes(numel, world_size)
    # A slice of the output may be the parameters themselves: it stays exact.
    inside = torch.empty(world_size * numel)
    own = inside.chunk(world_size)[dist.get_rank()]
    own.copy_(parts[dist.get_rank()])
    work = gather(inside, own, _world(), async_op=True)
    assert work is not None
    work.wait()
    assert torch.equal(own, parts[dist.get_rank()])
    whole = torch.empty(world_size * 3, dtype=torch.int64)
    gather(whole, torch.arange(3) + dist.get_rank(), _world())
    assert whole.view(world_size, 3)[:, 0].tolist() == list(range(world_size))


@ranks(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reduce_scatter_in_one_and_two_hops(dtype: torch.dtype) -> None:
    numel, size = 1000, 4
    inputs = [
        torch.randn(size, numel, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(size)
    ]
    expected = torch.stack([x.float() for x in inputs]).sum(0)[dist.get_rank()]
    hierarchy = Hierarchy.of(2)
    for bits, limit in ((8, 0.02), (4, 0.35)):
        for grid in (None, hierarchy):
            reduce = QuantizedReduceScatter(IntCompressor(bits=bits), hierarchy=grid)
            for op, factor in ((dist.ReduceOp.SUM, 1.0), (dist.ReduceOp.AVG, 1 / size)):
                out = torch.empty(numel)
                before = inputs[dist.get_rank()].clone()
                reduce(out, inputs[dist.get_rank()].view(-1), _world(), op)
                assert torch.equal(inputs[dist.get_rank()], before)
                error = (out - factor * expected).norm() / (factor * expected).norm()
                assert 0 < error < limit
            if grid is None:
                assert reduce.traffic.num_bytes == 2 * reduce.wire_bytes(numel, 1, 4)
            else:
                # Inside: both slices of the other place. Across: one slice to the other machine.
                assert reduce.traffic.num_bytes == 2 * reduce.wire_bytes(numel, 2, 2)
                assert reduce.slow_traffic.num_bytes == 2 * reduce.wire_bytes(numel, 1, 2)
    hierarchy.destroy()


@ranks(2)
def test_stochastic_rounding_has_no_bias() -> None:
    x = torch.linspace(-1, 1, 512) * (dist.get_rank() + 1)
    reduce, total = QuantizedReduceScatter(), torch.zeros(256)
    for _ in range(400):
        out = torch.empty(256)
        reduce(out, x, _world())
        total += out
    expected = (torch.linspace(-1, 1, 512) * 3)[256 * dist.get_rank() :][:256]
    assert (total / 400 - expected).abs().max() < 0.06
    with pytest.raises(ValueError, match="op must be SUM or AVG, but is"):
        reduce(torch.empty(256), x, _world(), dist.ReduceOp.MAX)


def _fsdp_losses(gather: object | None, reduce: object | None, steps: int = 40) -> list[float]:
    model = mlp(width=64)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            if gather is not None:
                module.set_custom_all_gather(gather)  # type: ignore[arg-type]
            if reduce is not None:
                module.set_custom_reduce_scatter(reduce)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, dist.get_rank(), step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@ranks(2, groups_may_stay=True)
def test_inside_fsdp2() -> None:
    plain = _fsdp_losses(None, None)
    gather, reduce = QuantizedAllGather(), QuantizedReduceScatter(IntCompressor(bits=8))
    ours = _fsdp_losses(gather, reduce)
    assert gather.traffic.num_calls > 100 and reduce.traffic.num_calls > 100
    assert ours != plain
    assert sum(ours[-10:]) == pytest.approx(sum(plain[-10:]), rel=0.05)
    assert sum(ours[-10:]) < 0.6 * sum(ours[:10])


def _ddp_losses(start_step: int | None, steps: int = 60) -> tuple[list[float], CompressedHook | None]:
    model = DistributedDataParallel(mlp(width=300), bucket_cap_mb=0.2)
    hook = None if start_step is None else CompressedHook(start_step=start_step)
    if hook is not None:
        model.register_comm_hook(hook, CompressedHook.reduce)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, dist.get_rank(), step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for p in model.parameters():
        parts = [torch.empty_like(p) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, p.detach())
        assert torch.equal(parts[0], parts[1])
    return losses, hook


@ranks(2)
def test_inside_ddp() -> None:
    plain, _ = _ddp_losses(None)
    same, hook = _ddp_losses(1000)
    assert same == pytest.approx(plain, rel=1e-4)
    assert hook is not None
    dense = wire.all_reduce_bytes(4 * sum(p.numel() for p in mlp(width=300).parameters()), 2)
    assert hook.traffic.num_bytes == 60 * dense
    ours, hook = _ddp_losses(5)
    assert hook is not None
    assert hook.traffic.num_bytes < 5 * dense + 55 * dense / 31
    assert sum(ours[-10:]) < 1.3 * sum(plain[-10:])
    with pytest.raises(ValueError, match="start_step must be at least 2"):
        CompressedHook(start_step=1)


@ranks(2)
def test_a_hierarchy_must_divide_the_ranks() -> None:
    with pytest.raises(ValueError, match="local_size must divide the number of ranks 2, but is 3"):
        Hierarchy.of(3)


@ranks(2)
def test_the_hierarchy_must_be_that_of_the_group() -> None:
    hierarchy = Hierarchy.of(1)
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    reduce = QuantizedReduceScatter(hierarchy=hierarchy)
    x: Tensor = torch.zeros(8)
    with pytest.raises(ValueError, match="has 1 x 2 ranks, but the group has 1"):
        reduce(torch.empty(8), x, alone)
    hierarchy.destroy()
    dist.destroy_process_group(alone)
