"""Small models whose parameters are awkward: odd sizes, tied, frozen, unused, of size one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_zero.tensors.placeholder import ReducedGradient


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 3 * dim + 1)
        self.down = nn.Linear(3 * dim + 1, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Tiny(nn.Module):
    """Embedding, blocks, head; options make it awkward."""

    def __init__(self, dim: int = 15, layers: int = 3, *, tied: bool = False, extras: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(layers))
        self.head = nn.Linear(dim, 37, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        if extras:
            self.unused = nn.Linear(5, 7)
            self.scale = nn.Parameter(torch.ones(1))
            self.register_buffer("offset", torch.full((dim,), 0.5))
            self.register_buffer("scratch", torch.zeros(3), persistent=False)
            self.frozen = nn.Linear(dim, dim)
            for p in self.frozen.parameters():
                p.requires_grad_(False)
        self.extras = extras

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        if self.extras:
            x = self.frozen(x) * self.scale.to(x.dtype) + self.offset.to(x.dtype)
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), targets.flatten())


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """The micro-batch of one step and rank, a pure function of both."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    data = torch.randint(37, (2, 9), generator=generator)
    return data[:, :-1], data[:, 1:]


def assert_consumed(model: nn.Module) -> None:
    """Backward has left no gradient on the parameters: None, or a handle without memory."""
    assert all(p.grad is None or isinstance(p.grad, ReducedGradient) for p in model.parameters())
