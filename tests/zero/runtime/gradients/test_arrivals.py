"""Gradients that arrive any number of times in one backward, in any order, on some ranks only: as plain PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ds_zero
from ds_zero.comm.collectives import default_comm
from harness import ranks
from zero.graphs import Net, Program, batch, program
from zero.parity import everywhere, world

pytestmark = pytest.mark.filterwarnings("ignore:modules ran in another order")  # every forward is another one
STEPS = 2


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def by_torch(made: Program) -> tuple[list[float], dict[str, Tensor]]:
    """Norms and weights of one process that runs the micro-batches of all ranks."""
    model = Net(made)
    optimizer = sgd(model)
    norms = []
    _, size = world()
    for step in range(STEPS):
        for rank in range(size):
            for micro, forwards in enumerate(made.backwards):
                losses = [
                    model.loss(f, batch(made, step, micro, i, rank), rank) for i, f in enumerate(forwards)
                ]
                (torch.stack(losses).sum() / size).backward()
        params = [p for p in model.parameters() if p.grad is not None]
        limit = made.clip if made.clip is not None else float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(params, limit)))
        optimizer.step()
        optimizer.zero_grad()
    return norms, {name: value.detach() for name, value in model.state_dict().items()}


def by_shards(made: Program) -> tuple[list[float], dict[str, Tensor]]:
    rank, _ = world()
    model = Net(made)
    config = ds_zero.ZeroConfig(
        accumulation=made.accumulation, reduce_bucket_numel=made.bucket_numel, persistence_threshold_numel=0
    )
    model, optimizer = ds_zero.shard(model, sgd(model), made.stage, config=config)
    norms = []
    for step in range(STEPS):
        for micro, forwards in enumerate(made.backwards):
            last = micro == len(made.backwards) - 1
            waits = ds_zero.no_sync(model) if made.no_sync and not last else contextlib.nullcontext()
            with waits:
                losses = [
                    model.loss(f, batch(made, step, micro, i, rank), rank) for i, f in enumerate(forwards)
                ]
                torch.stack(losses).sum().backward()
        if made.clip is not None:
            norms.append(float(ds_zero.clip_grad_norm_(model, made.clip)))
        optimizer.step()
        optimizer.zero_grad()
    weights = everywhere(ds_zero.full_state_dict(model))
    ds_zero.destroy(model)
    return norms, weights


def check(made: Program) -> None:
    norms, weights = by_torch(made)
    own_norms, own = by_shards(made)
    if made.clip is not None:
        assert own_norms == pytest.approx(norms, rel=1e-4), made
    for name, value in weights.items():
        torch.testing.assert_close(
            own[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}\n{made}"
        )


@ranks(1, 2, 3)
def test_random_graphs(world_size: int) -> None:
    for seed in range(10):
        check(program(seed, world_size))


@pytest.mark.full
@pytest.mark.slow
@ranks(1, 2, 4, timeout_s=1200)
@pytest.mark.parametrize("begin", [1000, 2000, 3000, 4000])
def test_many_random_graphs(begin: int, world_size: int) -> None:
    """2,004 graphs: 167 for each start and number of ranks."""
    for seed in range(begin, begin + 167):
        check(program(seed, world_size))


# --- one model whose weight is used three times, each in a reentrant checkpoint of its own


class Shared(nn.Module):
    """`rounds` uses of one layer in each forward; ranks may differ in the number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, rounds: int) -> Tensor:
        x = x.clone().requires_grad_()
        for _ in range(rounds):
            x = checkpoint(lambda y: torch.tanh(self.layer(y)), x, use_reentrant=True)
        return self.head(x)


def inputs(number: int, rank: int) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * number + rank))


def mean_grads(rounds: list[int], number: int = 0) -> dict[str, Tensor]:
    """What every rank's gradient has to be after one backward on each rank, `rounds[r]` uses on rank r."""
    model = Shared()
    for rank, count in enumerate(rounds):
        (model(inputs(number, rank), count).square().mean() / len(rounds)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def shared(stage: int, **config: object) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Shared()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = ds_zero.ZeroConfig(reduce_bucket_numel=1, **config)  # type: ignore[arg-type]
    return ds_zero.shard(model, optimizer, stage, config=options)


def backward(model: nn.Module, rounds: int, number: int = 0) -> None:
    model(inputs(number, world()[0]), rounds).square().mean().backward()


def assert_grads(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        grad = ds_zero.get_full(model, name, "grad")
        torch.testing.assert_close(grad, value, msg=lambda m, n=name: f"gradient of {n}: {m}")


@ranks(2)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_rank_that_uses_a_weight_more_often(stage: int) -> None:
    model, _ = shared(stage, accumulation="sharded")
    backward(model, 3 if dist.get_rank() else 1)
    assert_grads(model, mean_grads([1, 3]))  # before anything has asked for complete gradients
    ds_zero.clip_grad_norm_(model, float("inf"))
    assert_grads(model, mean_grads([1, 3]))


@ranks(2)
def test_late_gradients_go_with_those_that_are_dropped() -> None:
    model, optimizer = shared(1, accumulation="sharded")
    backward(model, 3 if dist.get_rank() else 1)
    optimizer.zero_grad()
    backward(model, 2, number=1)
    assert_grads(model, mean_grads([2, 2], number=1))


@ranks(2)
def test_late_gradients_wait_through_no_sync() -> None:
    model, _ = shared(2)
    backward(model, 3 if dist.get_rank() else 1)
    with ds_zero.no_sync(model):
        backward(model, 2, number=1)
    ds_zero.clip_grad_norm_(model, float("inf"))
    first, second = mean_grads([1, 3]), mean_grads([2, 2], number=1)
    assert_grads(model, {name: first[name] + second[name] for name in first})


@ranks(2)
@pytest.mark.parametrize("plan", ["local", "sharded"])
def test_a_repeated_weight_is_reduced_once_a_backward_after_the_first(plan: str) -> None:
    comm = default_comm(torch.device("cpu"))
    model = Shared()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = ds_zero.ZeroConfig(reduce_bucket_numel=1, accumulation=plan)
    model, optimizer = ds_zero.shard(model, optimizer, 1, config=config, comm=comm)
    sent = []
    for step in range(3):
        before = comm.reduced_bytes
        backward(model, 3, number=step)
        optimizer.step()
        optimizer.zero_grad()
        sent.append(comm.reduced_bytes - before)
    once = sum(p.numel() for p in model.parameters()) * 4 // 2
    assert sent[1:] == [pytest.approx(once, rel=0.3)] * 2
    if plan == "sharded":  # the first backward learns
        assert sent[0] > sent[1]


@ranks(2)
@pytest.mark.parametrize("stage", [1, 3])
def test_checkpointed_chunks_outside_of_the_forward_are_one_backward(stage: int) -> None:
    """The first backward that reaches the model runs inside of another one, whose end counts."""
    rank = dist.get_rank()
    plain = Shared()
    model, optimizer = shared(
        stage, accumulation="local", accumulation_steps=1, persistence_threshold_numel=0
    )

    def loss(model: nn.Module, number: int, rank: int) -> Tensor:
        head = model.get_submodule("head")
        chunks = model(inputs(number, rank), 1).chunk(2 + rank)  # ranks differ in the number
        return torch.stack([checkpoint(_sum(head), c, use_reentrant=True) for c in chunks]).sum()

    for step in range(2):
        loss(model, step, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(2):
        torch.stack([loss(plain, step, r) for r in range(2)]).sum().div(2).backward()
        reference.step()
        reference.zero_grad()
    found = everywhere(ds_zero.full_state_dict(model))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(found[name], value)


def _sum(head: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda y: head(y).square().sum() / 32
