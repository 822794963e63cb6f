"""`AllGather` and `ReduceScatter`: implementations train alike, and are used for what they declare."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_zero
from ds_zero.comm.collectives import (
    Comm,
    DirectAllGather,
    OrderedReduceScatter,
    TorchAllGather,
    TorchReduceScatter,
)
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


def train(comm: Comm, stage: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = ds_zero.ZeroConfig(persistence_threshold_numel=0)
    model, optimizer = ds_zero.shard(model, optimizer, stage, config=config, comm=comm)
    for step in range(2):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        model(x).square().mean().backward()
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


def test_capabilities_are_those_that_the_class_itself_declares() -> None:
    class Derived(OrderedReduceScatter):
        pass

    class Declared(OrderedReduceScatter):
        capabilities = Capabilities(pieces=True)

    assert capabilities_of(OrderedReduceScatter()) == Capabilities(tags=True, pieces=True)
    assert capabilities_of(Derived()) == Capabilities()
    assert capabilities_of(Declared()) == Capabilities(pieces=True)
    assert capabilities_of(TorchReduceScatter()) == Capabilities()
