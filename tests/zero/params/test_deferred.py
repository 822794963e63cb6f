"""Deferred construction gives bitwise the weights of ordinary construction."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_zero
from harness import ranks
from zero.models import Tiny


class InInit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 5) / math.sqrt(5))
        self.bias = nn.Parameter(torch.empty(7).uniform_(-1, 1))
        self.register_buffer("mask", torch.tril(torch.ones(5, 5)))
        self.register_buffer("positions", torch.arange(9), persistent=False)
        self.register_buffer("frequencies", 1.0 / (10000 ** (torch.arange(0, 6, 2).float() / 6)))


class ByApply(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.embed = nn.Embedding(9, 6, padding_idx=2)
        self.apply(self._init)
        with torch.no_grad():
            self.layers[1].weight.mul_(1 / math.sqrt(2 * 3))

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


class Orthogonal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        nn.init.orthogonal_(self.a.weight)
        with torch.no_grad():
            self.b.weight.copy_(self.a.weight.t())
            self.b.weight[1:3, 2].fill_(4.0)
            self.b.weight.data[0] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])


class ReadsValues(nn.Module):
    """Drop-path rates are read as Python numbers while the model is built."""

    def __init__(self) -> None:
        super().__init__()
        rates = [x.item() for x in torch.linspace(0, 0.5, 4)]
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in rates)
        for layer, rate in zip(self.layers, rates, strict=True):
            nn.init.constant_(layer.bias, rate)


CASES: list[Callable[[], nn.Module]] = [
    InInit,
    ByApply,
    Orthogonal,
    ReadsValues,
    Tiny,
    lambda: Tiny(tied=True),
]


@ranks(1, 2)
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_weights_are_those_of_ordinary_construction(case: int, stage: int) -> None:
    torch.manual_seed(7)
    ordinary = CASES[case]()
    next_number = torch.rand(())
    torch.manual_seed(7 + (dist.get_rank() if dist.is_initialized() else 0))
    with ds_zero.deferred_init(stage=stage):
        model = CASES[case]()
    if not dist.is_initialized() or dist.get_rank() == 0:
        assert torch.equal(torch.rand(()), next_number), (
            "the generator must be left as ordinary construction leaves it"
        )
    assert all(p.device.type == "meta" for p in model.parameters())
    names = {n: id(p) for n, p in model.named_parameters()}
    ds_zero.shard(model, torch.optim.SGD(model.parameters(), lr=0.1), stage)
    assert {n: id(p) for n, p in model.named_parameters()} == names
    assert not any(p.device.type == "meta" for p in [*model.parameters(), *model.buffers()])
    found = ds_zero.full_state_dict(model)
    if not dist.is_initialized() or dist.get_rank() == 0:
        expected = ordinary.state_dict()
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), ordinary.buffers(), strict=True))


@ranks(2)
def test_training_goes_on_as_from_ordinary_construction() -> None:
    from zero.models import batch

    results = []
    for deferred in (False, True):
        torch.manual_seed(1)
        if deferred:
            with ds_zero.deferred_init():
                model = Tiny()
        else:
            model = Tiny()
        optimizer = torch.optim.AdamW(model.parameters())
        ds_zero.shard(model, optimizer, 3)
        for step in range(3):
            model(*batch(step, dist.get_rank())).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(ds_zero.full_state_dict(model))
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


def test_the_stage_is_held_to() -> None:
    with ds_zero.deferred_init(stage=3):
        model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"deferred_init\(stage=3\) and is sharded with stage=1"):
        ds_zero.shard(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)


def test_other_meta_tensors_are_refused_with_a_remedy() -> None:
    model = nn.Linear(3, 3, device="meta")
    with pytest.raises(ValueError, match=r"'weight' is a meta tensor.*deferred_init"):
        ds_zero.shard(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)


def test_nothing_is_allocated_for_values() -> None:
    with ds_zero.deferred_init():
        layer = nn.Embedding(1 << 30, 1 << 10, _weight=torch.empty(1 << 30, 1 << 10))  # 4 TiB
    assert layer.weight.numel() == 1 << 40
    assert layer.weight.device.type == "meta"
