"""Models whose saved tensors are of many kinds, and a training step that compares gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """A transformer block: views of one projection, an activation that is saved twice, dropout, an in-place ReLU."""

    def __init__(self, dim: int, act: Callable[[Tensor], Tensor] = F.gelu, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(dim), nn.Dropout(dropout)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        x = x + self.drop(
            self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        )
        gate = self.up(self.norm(x))
        return x + self.down(self.act(gate) * torch.sigmoid(gate))


class Net(nn.Module):
    """Blocks in a list, with an embedding before and a tied head behind."""

    def __init__(self, dim: int = 32, layers: int = 4, **kwargs: object) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, dim)
        self.blocks = nn.ModuleList(Block(dim, **kwargs) for _ in range(layers))  # type: ignore[arg-type]
        self.run: Callable[[nn.Module, Tensor], Tensor] = lambda block, x: block(x)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = self.run(block, x)
        logits = F.linear(x, self.embed.weight)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def net(**kwargs: object) -> Net:
    torch.manual_seed(0)
    return Net(**kwargs)  # type: ignore[arg-type]


def batch(seed: int = 1, tokens: int = 16) -> Tensor:
    return torch.randint(0, 50, (4, tokens), generator=torch.Generator().manual_seed(seed))


def gradients(
    model: nn.Module, around: AbstractContextManager[object] | None = None, seed: int = 1
) -> list[Tensor]:
    """Gradients of one step, whose forward runs within `around`."""
    model.zero_grad()
    torch.manual_seed(seed)
    with around or nullcontext():
        loss = model(batch(seed))
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
