"""Small trainings that the engine's tests share."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_engine
from harness import verdict
from harness.jobs import Body
from harness.pool import Pool


def on_ranks(
    request: pytest.FixtureRequest,
    world_size: int,
    body: Callable[..., None],
    groups_may_stay: bool = False,
    **arguments: Any,
) -> None:
    """Run `body` on ranks in the middle of a test, for tests that need several world sizes one after the
    other. `groups_may_stay` as for `@ranks`."""
    where = Body(body.__module__, inspect.getfile(body), body.__qualname__)
    result = Pool.of(request.config).run(
        where, world_size, arguments, timeout_s=60, groups_may_stay=groups_may_stay
    )
    sys.stdout.write(result.output)
    verdict.announce(result)


class Net(nn.Module):
    """Odd sizes (no rank count divides them), a frozen parameter, tied weights, persistent and other
    buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.inner = nn.Sequential(nn.Linear(7, 13), nn.LayerNorm(13), nn.GELU(), nn.Linear(13, 7))
        self.scale = nn.Parameter(torch.full((7,), 1.5), requires_grad=False)
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("mask", torch.arange(7.0), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        self.seen += tokens.numel()
        return self.head(self.inner(self.embed(tokens)) * self.scale + self.mask.to(self.scale.dtype) / 100)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def config(stage: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "train_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_type": "linear"}},
        "zero_optimization": {"stage": stage},
        "startup_summary": False,
        **more,
    }


def engine(stage: int = 0, seed: int = 0, **more: Any) -> ds_engine.Engine:
    made, *_ = ds_engine.initialize(model=net(seed), config=config(stage, **more))
    return made


def micro_batches(made: ds_engine.Engine, steps: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's micro-batches of some global steps; the global batches are the same on every rank count."""
    found = []
    batch, ranks = made.batch, made.world.world_size
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 + step)
        tokens = torch.randint(0, 11, (batch.train,), generator=generator)
        wanted = torch.randint(0, 11, (batch.train,), generator=generator)
        for k in range(batch.steps):
            begin = (k * ranks + made.world.rank) * batch.micro
            found.append((tokens[begin : begin + batch.micro], wanted[begin : begin + batch.micro]))
    return found


def loss_of(made: Any, tokens: Tensor, wanted: Tensor) -> Tensor:
    return nn.functional.cross_entropy(made(tokens).float(), wanted)


def train(made: ds_engine.Engine, steps: int, first: int = 0) -> list[float]:
    """Losses of this rank's micro-batches over global steps first to first + steps."""
    losses = []
    for tokens, wanted in micro_batches(made, first + steps)[first * made.batch.steps :]:
        loss = loss_of(made, tokens, wanted)
        made.backward(loss)
        made.step()
        losses.append(loss.item())
    return losses
