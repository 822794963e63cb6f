"""`AllGather` and `ReduceScatter`: implementations train alike, and are used for what they declare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import ds_zero
from ds_zero.comm.collectives import Collectives, Comm, TorchAllGather, TorchReduceScatter
from ds_zero.comm.direct import DirectAllGather, OrderedReduceScatter
from ds_zero.interfaces import Capabilities, Work, capabilities_of
from harness import ranks
from zero.parity import everywhere


class Recording:
    """Slow and without capabilities: every message through the backend, at once, and written down."""

    def __init__(self) -> None:
        self.calls: list[str] = []


class RecordingGather(Recording):
    def __call__(
        self, output: Tensor, input: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Work | None:
        self.calls.append("gather")
        parts = [torch.empty_like(input) for _ in range(group.size())]
        dist.all_gather(parts, input.clone(), group=group)
        output.copy_(torch.cat(parts))
        return None


class RecordingReduce(Recording):
    def __call__(
        self,
        output: Tensor,
        input: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> Work | None:
        self.calls.append("reduce")
        whole = input.to(output.dtype)
        dist.all_reduce(whole, group=group)
        output.copy_(whole.view(group.size(), -1)[group.rank()])
        if op == dist.ReduceOp.AVG:
            output.div_(group.size())
        return None


class UnevenGather(RecordingGather):
    capabilities = Capabilities(uneven=True)

    def __call__(
        self,
        output: Tensor,
        input: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
        *,
        sizes: Sequence[int] | None = None,
    ) -> Work | None:
        if sizes is None:
            return super().__call__(output, input, group, async_op)
        self.calls.append("uneven gather")
        parts = [torch.empty(size, dtype=input.dtype) for size in sizes]
        for rank, part in enumerate(parts):
            if rank == group.rank():
                part.copy_(input)
            dist.broadcast(part, group=group, group_src=rank)
        output.copy_(torch.cat(parts))
        return None


class UnevenReduce(RecordingReduce):
    capabilities = Capabilities(uneven=True)

    def __call__(
        self,
        output: Tensor,
        input: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
        *,
        sizes: Sequence[int] | None = None,
    ) -> Work | None:
        if sizes is None:
            return super().__call__(output, input, group, op, async_op)
        self.calls.append("uneven reduce")
        whole = input.to(output.dtype)
        dist.all_reduce(whole, group=group)
        output.copy_(torch.split(whole, list(sizes))[group.rank()])
        if op == dist.ReduceOp.AVG:
            output.div_(group.size())
        return None


def train(comm: Comm, stage: int, mesh: DeviceMesh | None = None, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = ds_zero.ZeroConfig(persistence_threshold_numel=0, **options)
    model, optimizer = ds_zero.shard(model, optimizer, stage, mesh, config=config, comm=comm)
    for step in range(2):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        model(x.to(next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return everywhere(ds_zero.full_state_dict(model))


@ranks(2)
@pytest.mark.parametrize("stage", [1, 3])
def test_implementations_train_alike(stage: int) -> None:
    expected = train(Comm(DirectAllGather(), OrderedReduceScatter()), stage)
    gather, reduce = RecordingGather(), RecordingReduce()
    for comm in (Comm(TorchAllGather(), TorchReduceScatter()), Comm(gather, reduce)):
        found = train(comm, stage)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)
    assert gather.calls
    assert reduce.calls  # not passed by, since it does not declare that it takes pieces


@ranks(2)
@pytest.mark.parametrize("stage", [1, 2])
def test_uneven_slices_go_to_those_that_declare_them(stage: int) -> None:
    expected = train(Comm(DirectAllGather(), OrderedReduceScatter()), stage, layout="whole")
    for able in (False, True):
        gather = UnevenGather() if able else RecordingGather()
        reduce = UnevenReduce() if able else RecordingReduce()
        result = train(Comm(gather, reduce), stage, layout="whole")
        for name, value in expected.items():
            torch.testing.assert_close(result[name], value)
        assert ("uneven gather" in gather.calls) == ("uneven reduce" in reduce.calls) == able


class Fp32Gather(RecordingGather):
    capabilities = Capabilities(dtypes=frozenset([torch.float32]))


class Fp32Reduce(RecordingReduce):
    capabilities = Capabilities(dtypes=frozenset([torch.float32]))


@ranks(2)
def test_what_a_collective_does_not_move_travels_by_the_default() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        expected = train(Comm(DirectAllGather(), OrderedReduceScatter()), 3, param_dtype=dtype)
        gather, reduce = Fp32Gather(), Fp32Reduce()
        result = train(Comm(gather, reduce), 3, param_dtype=dtype)
        for name, value in expected.items():
            torch.testing.assert_close(result[name], value)
        assert bool(reduce.calls) == (dtype == torch.float32)
        assert all(name == "gather" for name in gather.calls)  # masters are fp32 in both


@ranks(4, groups_may_stay=True)
def test_an_axis_may_have_collectives_of_its_own() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    expected = train(Comm(DirectAllGather(), OrderedReduceScatter()), 2, mesh)
    gather, reduce = RecordingGather(), RecordingReduce()
    comm = Comm(DirectAllGather(), OrderedReduceScatter(), axes={"replicate": Collectives(gather, reduce)})
    result = train(comm, 2, mesh)
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value)
    assert reduce.calls and gather.calls  # between the rows alone
    with pytest.raises(ValueError, match="there is no axis 'rows'; there are data, replicate"):
        Comm(DirectAllGather(), OrderedReduceScatter(), axes={"rows": Collectives(gather, reduce)})


def test_capabilities_are_those_that_the_class_itself_declares() -> None:
    class Derived(OrderedReduceScatter):
        pass

    class Declared(OrderedReduceScatter):
        capabilities = Capabilities(pieces=True)

    assert capabilities_of(OrderedReduceScatter()) == Capabilities(tags=True, pieces=True)
    assert capabilities_of(Derived()) == Capabilities()
    assert capabilities_of(Declared()) == Capabilities(pieces=True)
    assert capabilities_of(TorchReduceScatter()) == Capabilities()
