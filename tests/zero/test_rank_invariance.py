"""The same global micro-batches give the same bits on any power of two of ranks, also across a restart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_zero
from ds_offload import CPUAdam, HostStore
from engine.jobs import on_ranks
from harness import ranks
from zero.models import Tiny, batch
from zero.params.test_records import Memory, everyones
from zero.parity import everywhere, world

MICRO_BATCHES = 8
STEPS = 20


def tree(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else tree(parts[: len(parts) // 2]) + tree(parts[len(parts) // 2 :])


def plain(steps: int) -> dict[str, Tensor]:
    """One process, plain PyTorch: the gradients of all micro-batches, added pairwise."""
    torch.manual_seed(0)
    model = Tiny(tied=True)
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        found: list[list[Tensor]] = []
        for micro in range(MICRO_BATCHES):
            loss = model(*batch(step, micro)) / MICRO_BATCHES
            found.append(list(torch.autograd.grad(loss, params)))
        total = [tree([grads[i] for grads in found]) for i in range(len(params))]
        factor = torch.clamp(0.3 / (ds_zero.total_norm(total) + 1e-6), max=1.0)
        for param, grad in zip(params, total, strict=True):
            param.grad = grad * factor
        optimizer.step()
    return {n: v.detach() for n, v in model.state_dict().items()}


def made(stage: int, invariant: bool = True, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Tiny(tied=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    config = ds_zero.ZeroConfig(rank_invariant=invariant, accumulation="sharded", reduce_bucket_numel=700)
    return ds_zero.shard(model, optimizer, stage, config=config)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    rank, size = world()
    mine = range(rank, MICRO_BATCHES, size)
    for step in steps:
        for micro in mine:
            (model(*batch(step, micro)) / len(mine)).backward()
        ds_zero.clip_grad_norm_(model, 0.3)
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return everywhere(ds_zero.full_state_dict(model))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[n], b[n]) for n in a | b)


@ranks(1, 2, 4)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_any_number_of_ranks_gives_the_bits_of_one_process(stage: int) -> None:
    model, optimizer = made(stage)
    train(model, optimizer, range(STEPS))
    assert same(weights(model), plain(STEPS))


@pytest.mark.full
@ranks(8, timeout_s=300)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_eight_ranks(stage: int) -> None:
    model, optimizer = made(stage)
    train(model, optimizer, range(STEPS))
    assert same(weights(model), plain(STEPS))


@ranks(2)
def test_in_order_of_arrival_the_bits_depend_on_the_number_of_ranks() -> None:
    """What the option is for; should this fail, the test above shows nothing."""
    model, optimizer = made(2, invariant=False)
    train(model, optimizer, range(STEPS))
    assert not same(weights(model), plain(STEPS))


@ranks(1)
@pytest.mark.parametrize("count, waiting", [(1, 0), (2, 0), (3, 1), (5, 1), (8, 2)])
def test_sums_that_wait_are_few_and_kept(count: int, waiting: int) -> None:
    """Any number of micro-batches gives their mean; of 2^j of them, j - 1 sums wait at most."""
    model, optimizer = made(2)
    exact = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()]
    for step in range(3):
        for grad in exact:
            grad.zero_()
        for micro in range(count):
            (model(*batch(step, micro)) / count).backward()
            with ds_zero.gathered(list(model.parameters())):
                again = Tiny(tied=True)
                again.load_state_dict(ds_zero.full_state_dict(model))
            loss = again(*batch(step, micro)) / count
            for total, grad in zip(exact, torch.autograd.grad(loss, list(again.parameters())), strict=True):
                total += grad
        ds_zero.clip_grad_norm_(model, 0.0)
        for total, shard in zip(exact, optimizer.param_groups[0]["params"], strict=True):
            torch.testing.assert_close(shard.grad, total.flatten().float(), rtol=1e-5, atol=1e-7)
        optimizer.step()
        optimizer.zero_grad()
    shard_bytes = 4 * ds_zero.describe(model).owned_numel
    assert ds_zero.memory(model, optimizer).grads_bytes == shard_bytes * (1 + waiting)


def save(folder: Path) -> None:
    model, optimizer = made(2)
    train(model, optimizer, range(10))
    found = everyones(ds_zero.records(model, optimizer))
    if dist.get_rank() == 0:
        torch.save(found, folder / "records.pt")
    train(model, optimizer, range(10, STEPS))
    expected = ds_zero.full_state_dict(model)
    if dist.get_rank() == 0:
        torch.save(expected, folder / "expected.pt")


def resume(folder: Path, stage: int) -> None:
    model, optimizer = made(stage, seed=7)
    ds_zero.load_records(model, optimizer, Memory(torch.load(folder / "records.pt", weights_only=False)))
    train(model, optimizer, range(10, STEPS))
    assert same(weights(model), torch.load(folder / "expected.pt"))


@pytest.mark.parametrize("size, stage", [(1, 1), (2, 3), pytest.param(8, 2, marks=pytest.mark.full)])
def test_stopped_on_four_ranks_and_resumed_on_another_number(
    request: pytest.FixtureRequest, tmp_path: Path, size: int, stage: int
) -> None:
    on_ranks(request, 4, save, folder=tmp_path)
    on_ranks(request, size, resume, folder=tmp_path, stage=stage)


@ranks(2)
def test_host_memory_takes_waiting_sums_too() -> None:
    def run(store: HostStore | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = Tiny()
        optimizer = CPUAdam(model.parameters(), lr=1e-2)
        ds_zero.shard(model, optimizer, 2, config=ds_zero.ZeroConfig(rank_invariant=True), store=store)
        train(model, optimizer, range(3))
        return weights(model)

    assert same(run(HostStore()), run(None))


def test_what_it_needs_cannot_be_switched_off() -> None:
    with pytest.raises(ValueError, match="rank_invariant=True needs"):
        ds_zero.ZeroConfig(rank_invariant=True, accumulation="local")
    with pytest.raises(ValueError, match="rank_invariant=True needs"):
        ds_zero.ZeroConfig(rank_invariant=True, ordered_reduction=False)
