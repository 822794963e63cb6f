"""Sums in a fixed order, and in two levels."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm.exchange import HierarchicalCollectives, Hierarchy, OrderedAllReduce, OrderedReduceScatter, wire
from harness import ranks


def _input(rank: int, numel: int) -> Tensor:
    """Values whose fp32 sum depends on the order."""
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank)) * 10.0 ** (3 * rank)


@ranks(3)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_ordered_sums(asynchronous: bool) -> None:
    numel = 3 * 100
    expected = torch.zeros(numel)
    for rank in range(3):
        expected += _input(rank, numel)
    x = _input(dist.get_rank(), numel)
    reduce, out = OrderedReduceScatter(), torch.empty(100)
    work = reduce(out, x, async_op=asynchronous)
    if work is not None:
        work.wait()
    assert torch.equal(out, expected.view(3, 100)[dist.get_rank()])
    assert reduce.traffic.num_bytes == 2 * 400
    reduce(out, x, op=dist.ReduceOp.AVG)
    assert torch.equal(out, expected.view(3, 100)[dist.get_rank()] / 3)
    everywhere = OrderedAllReduce()
    y = x[:-1].clone()  # not a multiple of the number of ranks
    everywhere(y, async_op=asynchronous).wait()
    assert torch.equal(y, expected[:-1])
    assert everywhere.traffic.num_bytes == wire.all_reduce_bytes(4 * numel, 3)
    half = x.to(torch.bfloat16)
    everywhere(half)
    total = torch.zeros(numel)
    for rank in range(3):
        total += _input(rank, numel).to(torch.bfloat16).float()
    assert torch.equal(half, total.to(torch.bfloat16))
    with pytest.raises(ValueError, match="op must be SUM or AVG"):
        reduce(out, x, op=dist.ReduceOp.MIN)


@ranks(4)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_two_levels(asynchronous: bool) -> None:
    hierarchy = Hierarchy.of(2)
    both = HierarchicalCollectives(hierarchy)
    for numel in (64, 63):
        x = _input(dist.get_rank(), numel)
        expected = sum((_input(rank, numel).double() for rank in range(4)), torch.zeros(numel).double())
        both.all_reduce(x, async_op=asynchronous).wait()
        torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-2)
        others = [torch.empty_like(x) for _ in range(4)]
        dist.all_gather(others, x)
        assert all(torch.equal(other, x) for other in others)
    local, across = both.traffic
    assert local.num_bytes == 2 * wire.all_reduce_bytes(4 * 64, 2)
    assert across.num_bytes == 2 * wire.all_reduce_bytes(4 * 32, 2)
    sent, out, expected_out = torch.arange(24.0) + 100 * dist.get_rank(), torch.empty(24), torch.empty(24)
    both.all_to_all(out, sent, async_op=asynchronous).wait()
    dist.all_to_all_single(expected_out, sent)
    assert torch.equal(out, expected_out)
    assert across.num_calls == 3
    with pytest.raises(ValueError, match="a multiple of 4 ranks, but have 6 and 6"):
        both.all_to_all(torch.empty(6), torch.empty(6))
    hierarchy.destroy()
