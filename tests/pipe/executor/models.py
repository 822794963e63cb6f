"""Small models for executor tests, and their training in one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_pipe import Schedule
from ds_pipe.executor import Executor, MemoryHub, Stage


class Block(nn.Module):
    """A residual block of attention-free layers with every kind of parameter that a decoder has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def stages(count: int, width: int = 8, vocab: int = 11) -> list[nn.Module]:
    """The stages of one model, from one seed."""
    torch.manual_seed(0)
    parts = [nn.Sequential(Block(width)) for _ in range(count)]
    parts[0].insert(0, nn.Embedding(vocab, width))
    parts[-1].append(nn.Linear(width, vocab))
    return parts


def batches(count: int, step: int = 0, vocab: int = 11) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and targets of the micro-batches of one step."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = [torch.randint(0, vocab, (2, 6), generator=generator) for _ in range(count)]
    return tokens, [torch.roll(t, 1, 1) for t in tokens]


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


def trained_alone(parts: Sequence[nn.Module], steps: int, num_microbatches: int) -> list[list[float]]:
    """Losses of training in one process."""
    optimizer = torch.optim.SGD([p for part in parts for p in part.parameters()], lr=0.1, momentum=0.9)
    losses = []
    for step in range(steps):
        inputs, targets = batches(num_microbatches, step)
        losses.append([])
        for x, y in zip(inputs, targets, strict=True):
            for part in parts:
                x = part(x)
            loss = loss_fn(x, y)
            losses[-1].append(loss.item())
            (loss / num_microbatches).backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def own_stages(schedule: Schedule, rank: int, parts: Sequence[nn.Module], **options: Any) -> dict[int, Stage]:
    last = schedule.num_stages - 1
    return {
        s: Stage(parts[s], s, loss_fn=loss_fn if s == last else None, **options)
        for s in schedule.stages_of(rank)
    }


def in_threads(num_ranks: int, body: Callable[[int], Any]) -> list[Any]:
    """Runs a function for every rank in its own thread; raises the error of the first rank that has one."""
    results: list[Any] = [None] * num_ranks
    errors: list[BaseException | None] = [None] * num_ranks

    def run(rank: int) -> None:
        try:
            results[rank] = body(rank)
        except BaseException as error:
            errors[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if error is not None:
            raise error
    return results


def trained_in_threads(
    schedule: Schedule, parts: Sequence[nn.Module], steps: int, **options: Any
) -> list[list[float]]:
    """Losses of training with one thread for each rank."""
    hub = MemoryHub(schedule.num_ranks)

    def body(rank: int) -> list[list[float]]:
        own = own_stages(schedule, rank, parts, **options)
        executor = Executor(schedule, rank, own, hub.transport(rank))
        params = [p for stage in own.values() for p in stage.parameters()]
        optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
        losses = []
        for step in range(steps):
            result = executor.step(*batches(schedule.num_microbatches, step))
            losses.append([loss.item() for loss in result.losses])
            optimizer.step()
            optimizer.zero_grad()
            assert not any(stage.num_kept for stage in own.values())
        executor.finish()
        executor.close()
        return losses

    return in_threads(schedule.num_ranks, body)[schedule.rank_of_stage[-1]]
