"""Random programs over shared modules: what a model may do between two steps, as data that a seed decides.

A program runs modules on values, each in a chain that may be checkpointed (both kinds, nested), repeated or skipped, so
that the gradient of a parameter may arrive any number of times in one backward.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DIM, NUM_MODULES = 4, 5
MODES = ("plain", "reentrant", "non-reentrant", "nested reentrant", "non-reentrant inside")


@dataclass(frozen=True)
class Statement:
    """One new value: the sum of `sources`, passed through the modules of `chain`."""

    chain: tuple[int, ...]
    mode: str
    """One of `MODES`."""
    sources: tuple[int, ...]
    """Indices of earlier values; 0 is the input."""
    skipped: frozenset[int] = frozenset()
    """Ranks on which the value passes through no module."""


@dataclass(frozen=True)
class Forward:
    """One pass over an input."""

    statements: tuple[Statement, ...]
    inside: bool
    """Whether the statements run inside of the model's forward, or call its modules from outside."""
    chunks: int
    """The number of parts in which the head's loss is computed, each in a reentrant checkpoint; 0: in one go."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """What a model is trained with."""

    seed: int
    stage: int
    backwards: tuple[tuple[Forward, ...], ...]
    """The micro-batches of one step; the forwards of each share a backward."""
    accumulation: str
    no_sync: bool
    """Whether all micro-batches but the last run in `no_sync`."""
    bucket_numel: int
    frozen: frozenset[int]
    """Modules that are not trained."""
    tied: bool
    clip: float | None


def program(seed: int, num_ranks: int) -> Program:
    """The program of a seed. At stage 3 all ranks run the same modules, as they must."""
    rng = random.Random(seed)
    stage = rng.randrange(4)
    return Program(
        seed=seed,
        stage=stage,
        backwards=tuple(
            tuple(_forward(rng, num_ranks if stage < 3 else 0) for _ in range(rng.choice((1, 1, 2))))
            for _ in range(rng.choice((1, 1, 2, 3)))
        ),
        accumulation=rng.choice(("local", "sharded")),
        no_sync=rng.random() < 0.2,
        bucket_numel=rng.choice((1, 30, 50, 1000)),
        frozen=frozenset(m for m in range(NUM_MODULES) if rng.random() < 0.1),
        tied=rng.random() < 0.2,
        clip=rng.choice((None, 0.05, 100.0)),
    )


def _forward(rng: random.Random, num_ranks: int) -> Forward:
    statements = tuple(
        Statement(
            chain=tuple(rng.choices(range(NUM_MODULES), k=rng.randint(1, 3))),
            mode=rng.choice(MODES),
            sources=tuple({value, rng.randint(0, value)}),
            skipped=frozenset(r for r in range(num_ranks) if rng.random() < 0.2),
        )
        for value in range(rng.randint(1, 5))
    )
    return Forward(statements, rng.random() < 0.6, rng.choice((0, 0, 1, 3)))


class Net(nn.Module):
    """Modules of several shapes, and a head, which every program uses on every rank."""

    def __init__(self, made: Program) -> None:
        super().__init__()
        torch.manual_seed(made.seed)
        self.parts = nn.ModuleList(_part(i) for i in range(NUM_MODULES))
        self.head = nn.Linear(DIM, 3)
        if made.tied:
            self.parts[2].weight = self.parts[0].weight
        for index in made.frozen:
            self.parts[index].requires_grad_(False)

    def forward(self, given: Forward, x: Tensor, rank: int) -> Tensor:
        return self.run(given, x, rank)

    def loss(self, given: Forward, x: Tensor, rank: int) -> Tensor:
        """The loss of one rank's input; the model's forward is only called where the program says so."""
        h = self(given, x, rank) if given.inside else self.run(given, x, rank)
        if not given.chunks:
            return self._end(h)
        losses = [
            checkpoint(self._end, part, use_reentrant=True) * (part.shape[0] / h.shape[0])
            for part in h.chunk(given.chunks)
        ]
        return torch.stack(losses).sum()

    def _end(self, h: Tensor) -> Tensor:
        return self.head(h).square().mean()

    def run(self, given: Forward, x: Tensor, rank: int) -> Tensor:
        values = [x.clone().requires_grad_()]
        for statement in given.statements:
            value = torch.stack([values[i] for i in statement.sources]).sum(0)
            if rank not in statement.skipped:
                value = self._chain(statement, value)
            values.append(value)
        return values[-1]

    def _chain(self, statement: Statement, value: Tensor) -> Tensor:
        def through(modules: Sequence[int]) -> Callable[[Tensor], Tensor]:
            def run(y: Tensor) -> Tensor:
                for index in modules:
                    y = torch.tanh(self.parts[index](y))
                return y

            return run

        chain, mode = statement.chain, statement.mode
        if mode == "plain":
            return through(chain)(value)
        if mode in ("reentrant", "non-reentrant"):
            return checkpoint(through(chain), value, use_reentrant=mode == "reentrant")

        def outer(y: Tensor) -> Tensor:
            y = checkpoint(through(chain[:1]), y, use_reentrant=mode == "nested reentrant")
            return through(chain[1:])(y)

        return checkpoint(outer, value, use_reentrant=True)


def _part(index: int) -> nn.Module:
    if index == 1:
        return nn.LayerNorm(DIM)
    if index == 3:
        return nn.Sequential(nn.Linear(DIM, 7), nn.Tanh(), nn.Linear(7, DIM))
    return nn.Linear(DIM, DIM)


def batch(made: Program, step: int, micro: int, number: int, rank: int) -> Tensor:
    """The input of one forward."""
    generator = torch.Generator().manual_seed(hash((made.seed, step, micro, number, rank)) % (1 << 62))
    return torch.randn(6, DIM, generator=generator)
