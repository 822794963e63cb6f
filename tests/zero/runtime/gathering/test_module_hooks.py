"""Stage 3 in the ways modules are used: checkpointed, shared, frozen, called from outside, fetched ahead."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ds_zero
from harness import ranks
from zero.models import Block, Tiny, batch

DIM = 16


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(DIM, DIM)
        self.blocks = nn.ModuleList(Block(DIM) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class Shared(nn.Module):
    """One block used three times, twice in a chain and once beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(DIM)])

    def forward(self, x: Tensor) -> Tensor:
        block = self.blocks[0]
        return block(block(x)) + block(2 * x)


class Container(nn.Module):
    """The unit's own forward is never called; its children are."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Module()
        self.parts.a = nn.Linear(DIM, DIM)
        self.parts.b = nn.Linear(DIM, DIM)
        self.table = nn.ModuleDict({"x": nn.Linear(DIM, DIM), "y": nn.ModuleList([nn.Linear(DIM, DIM)])})

    def forward(self, x: Tensor) -> Tensor:
        x = self.parts.b(self.parts.a(x).relu())
        return self.table["y"][0](self.table["x"](x))


class LowRank(nn.Module):
    """Frozen base, trained adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"base": nn.Linear(DIM, DIM), "a": nn.Linear(DIM, 2)}) for _ in range(3)
        )
        self.back = nn.ModuleList(nn.Linear(2, DIM) for _ in range(3))
        for layer in self.layers:
            layer["base"].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer, back in zip(self.layers, self.back, strict=True):
            x = layer["base"](x) + back(layer["a"](x))
        return x


class Outputs(nn.Module):
    """Units that take keyword arguments and return dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Inner() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        state = {"x": x, "n": 0}
        for block in self.blocks:
            state = block(state=state, scale=2.0)
        return state["x"]


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, *, state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
        return {"x": self.linear(state["x"]) * scale, "n": state["n"]}


class Plain(nn.Module):
    """Parameters of the model's own, besides units."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(DIM))
        self.matrix = nn.Parameter(torch.randn(DIM, DIM) / 4)
        self.blocks = nn.Sequential(Block(DIM), Block(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x + self.token) @ self.matrix.t()


CASES: list[Callable[[], nn.Module]] = [Checkpointed, Shared, Container, LowRank, Outputs, Plain]


def data(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    return torch.randn(3, DIM, generator=generator)


@ranks(2)
@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_stage_3_trains_like_stage_0(case: int, prefetch: bool) -> None:
    results = []
    for stage in (0, 3):
        torch.manual_seed(0)
        model = CASES[case]()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        config = ds_zero.ZeroConfig(accumulation="sharded", persistence_threshold_numel=0, prefetch=prefetch)
        ds_zero.shard(model, optimizer, stage, config=config)
        for step in range(4):
            model(data(step)).square().mean().backward()
            assert ds_zero.memory(model, optimizer).gathered_bytes == 0
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            results.append((model(data(9)), ds_zero.full_state_dict(model)))
        assert ds_zero.memory(model, optimizer).gathered_bytes == 0
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][n], results[1][1][n]) for n in results[0][1])


@ranks(2)
def test_the_next_unit_is_fetched_before_its_module_runs() -> None:
    """Fails if prefetch is ignored: in the second pass a unit's gathering starts before its own pre-hook."""
    from ds_zero import _registry

    for prefetch in (True, False):
        model = nn.Sequential(*(nn.Linear(DIM, DIM) for _ in range(4)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = ds_zero.ZeroConfig(persistence_threshold_numel=0, prefetch=prefetch)
        ds_zero.shard(model, optimizer, 3, config=config)
        gatherer = _registry.state_of(model).gatherer
        events: list[str] = []
        start = gatherer.start

        def spy(bucket: object, start: Callable[..., None] = start, events: list[str] = events) -> None:
            if bucket.state.value == "sharded":  # type: ignore[attr-defined]
                events.append(f"gather {bucket.layout.unit}")  # type: ignore[attr-defined]
            start(bucket)

        gatherer.start = spy  # type: ignore[method-assign,assignment]
        for name, child in model.named_children():
            child.register_forward_hook(lambda *_, name=name, events=events: events.append(f"ran {name}"))
        model(data(0)).sum().backward()
        events.clear()
        with torch.no_grad():
            model(data(1))
        fetched_early = events.index("gather 1") < events.index("ran 0")
        assert fetched_early == prefetch, events


@ranks(2)
def test_a_changed_order_is_followed_and_said_once() -> None:
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(4))
            self.order = [0, 1, 2, 3]

        def forward(self, x: Tensor) -> Tensor:
            for i in self.order:
                x = self.blocks[i](x)
            return x

    results = []
    for stage in (0, 3):
        torch.manual_seed(0)
        model = Switch()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ds_zero.shard(model, optimizer, stage, config=ds_zero.ZeroConfig(persistence_threshold_numel=0))
        for step, order in enumerate([[0, 1, 2, 3], [3, 1, 0, 2], [0, 1], [1, 1, 2, 3], [0, 1, 2, 3]]):
            model.order = order
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                model(data(step)).square().mean().backward()
            texts = [str(w.message) for w in said]
            assert len(texts) == (stage == 3 and step == 1), texts
            assert all("'blocks.3' where 'blocks.0' was expected" in text for text in texts)
            optimizer.step()
            optimizer.zero_grad()
        results.append(ds_zero.full_state_dict(model))
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


@ranks(2)
def test_a_forward_that_raises_leaves_a_model_that_works() -> None:
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ds_zero.shard(model, optimizer, 3, config=ds_zero.ZeroConfig(persistence_threshold_numel=0))
    tokens, targets = batch(0, dist.get_rank())
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        model(tokens, targets[:, :3])
    model(tokens, targets).backward()
    optimizer.step()
    assert ds_zero.memory(model, optimizer).gathered_bytes == 0


@ranks(2)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_backwards_over_one_graph(stage: int) -> None:
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    ds_zero.shard(model, optimizer, stage, config=ds_zero.ZeroConfig(accumulation="sharded"))
    loss = model(*batch(0, dist.get_rank()))
    loss.backward(retain_graph=True)
    once = [s.grad.clone() for s in optimizer.param_groups[0]["params"] if s.numel()]
    loss.backward()
    twice = [s.grad for s in optimizer.param_groups[0]["params"] if s.numel()]
    assert all(torch.equal(2 * a, b) for a, b in zip(once, twice, strict=True))
