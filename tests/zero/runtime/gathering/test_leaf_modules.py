"""Mixtures of experts: ranks choose different experts, and training equals that of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_zero
from ds_zero import _registry
from ds_zero.layout.units import choose_leaves, choose_units
from harness import ranks

DIM = 8


class Mixture(nn.Module):
    """One module per expert; each token goes to one of them, and an expert without tokens is not called."""

    def __init__(self, name: str = "experts") -> None:
        super().__init__()
        self.router = nn.Linear(DIM, 4)
        setattr(self, name, nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(4)))
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        chosen = scores.argmax(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(getattr(self, self.name)):
            rows = (chosen == i).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * scores[rows, i : i + 1])
        return out


class Model(nn.Module):
    """Mixtures outside of any block, so that each expert would be a unit of its own."""

    def __init__(self, name: str = "experts") -> None:
        super().__init__()
        self.first, self.second = Mixture(name), Mixture(name)
        self.last = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return self.last(x + self.second(x))


def batch(step: int, rank: int, rows: int = 2) -> Tensor:
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(100 * step + rank))


def skipped(model: Model, x: Tensor) -> set[int]:
    return set(range(4)) - set(model.first.router(x).argmax(-1).tolist())


@ranks(2)
@pytest.mark.parametrize("name, found", [("experts", True), ("choices", False)])
def test_a_mixture_trains_as_in_one_process(name: str, found: bool) -> None:
    """Found by itself where its children say so, named otherwise."""
    torch.manual_seed(0)
    plain = Model(name)
    model = Model(name)
    model.load_state_dict(plain.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, model)]
    config = ds_zero.ZeroConfig(
        persistence_threshold_numel=0, order_timeout_s=3, leaf_modules=() if found else ("Mixture",)
    )
    ds_zero.shard(model, optimizers[1], 3, config=config)
    differ = 0
    for step in range(4):
        chosen = [skipped(plain, batch(step, rank)) for rank in range(2)]
        differ += chosen[0] != chosen[1]
        loss = sum(plain(batch(step, rank)).square().mean() for rank in range(2)) / 2
        loss.backward()
        mine = model(batch(step, dist.get_rank())).square().mean()
        mine.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert differ, "the ranks have to choose different experts"
    values = ds_zero.full_state_dict(model)
    if dist.get_rank() == 0:
        for fqn, value in plain.named_parameters():
            assert torch.allclose(values[fqn], value, atol=1e-6), fqn


class Lazy(nn.Module):
    """On rank 1 nothing of it is used, and its input needs no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        out = torch.zeros_like(x)
        for i in range(0 if dist.get_rank() else 2):
            out = out + self.experts[i](x)
        return out, 7


class Front(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lazy = Lazy()
        self.last = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        out, seven = self.lazy(x)
        assert seven == 7
        return self.last(out)


@ranks(2)
def test_a_rank_whose_leaf_does_nothing_meets_its_backward() -> None:
    """Without the tie it would not gather in backward, and the other rank would wait for it."""
    torch.manual_seed(0)
    model = Front()
    reference = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = ds_zero.ZeroConfig(persistence_threshold_numel=0, order_timeout_s=3)
    ds_zero.shard(model, optimizer, 3, config=config)
    model(batch(0, 0)).square().mean().backward()
    optimizer.step()
    values = ds_zero.full_state_dict(model)
    if dist.get_rank() == 0:
        for value in reference.values():
            value.requires_grad_()
        plain = Front()
        torch.func.functional_call(plain, reference, (batch(0, 0),)).square().mean().backward()
        expert = "lazy.experts.1.weight"
        gradient = reference[expert].grad
        assert gradient is not None
        # The other rank counts as a gradient of zero.
        assert torch.allclose(values[expert], reference[expert].detach() - 0.1 * gradient / 2, atol=1e-7)


def units_of(model: nn.Module, **options: object) -> set[str]:
    return set(choose_units(model, choose_leaves(model, is_marked=_registry.is_leaf, **options)))  # type: ignore[arg-type]


def test_leaves_are_units_with_all_they_contain() -> None:
    assert units_of(Model()) == {"first", "second", "last"}
    split = units_of(Model("choices"))
    assert "first.choices.0" in split
    assert "first.router" in split
    assert units_of(Model("choices"), leaves=(Mixture,)) == {"first", "second", "last"}
    assert "second.choices.3" in units_of(Model("choices"), leaves=("first",))
    assert units_of(Model("choices"), leaves=(f"{__name__}.Mixture",)) == {"first", "second", "last"}
    assert units_of(Model("choices"), granularity_numel=1000) == {""}
    model = Model("choices")
    assert [type(m) for m in ds_zero.set_leaf_modules(model, ["second"])] == [Mixture]
    assert {"second", "first.choices.0"} <= units_of(model)
    # Where a block contains it, the block is the unit.
    assert units_of(nn.Sequential(Model(), Model())) == {"0", "1"}


def test_an_unknown_leaf_is_refused() -> None:
    with pytest.raises(ValueError, match=r"leaf module 'Mixtrue'.*the classes are Linear, Mixture, Model"):
        ds_zero.set_leaf_modules(Model(), ["Mixtrue"])
    model = Model()
    config = ds_zero.ZeroConfig(leaf_modules=("third",))
    with pytest.raises(ValueError, match="leaf module 'third'"):
        ds_zero.shard(model, torch.optim.SGD(model.parameters(), lr=0.1), 3, config=config)
    with pytest.raises(ValueError, match="leaf_modules='Mixture': give a tuple"):
        ds_zero.ZeroConfig(leaf_modules="Mixture")  # type: ignore[arg-type]
