"""A decoder-only transformer over bytes, as plain as it gets: nothing in it knows about ds.

Shapes: B batch, T tokens, D width, H heads, K = D / H.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256


def rotate(x: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, equation 34): turns each pair of channels of (B, H, T, K) by its position."""
    half = x.shape[-1] // 2
    position = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)
    frequency = 10_000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = position[:, None] * frequency
    cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)


def shift_half(x: Tensor) -> Tensor:
    """(B, T, D) with the second half of the channels one token late, so that every head sees pairs of bytes."""
    now, late = x.chunk(2, dim=-1)
    return torch.cat((now, F.pad(late[:, :-1], (0, 0, 1, 0))), dim=-1)


class Block(nn.Module):
    """Causal self-attention and a feed-forward network, each on a normalised residual stream."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim, bias=False)
        self.attention_out = nn.Linear(dim, dim, bias=False)
        self.mlp_norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        batch, tokens, dim = x.shape
        projected = self.query_key_value(shift_half(self.attention_norm(x)))
        query, key, value = projected.view(batch, tokens, 3, self.heads, dim // self.heads).permute(
            2, 0, 3, 1, 4
        )
        mixed = F.scaled_dot_product_attention(rotate(query), rotate(key), value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, tokens, dim))
        out: Tensor = x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))
        return out


class GPT(nn.Module):
    """Bytes in, the loss or the scores of the next byte out. 10.8 million parameters with the default shape."""

    def __init__(self, layers: int = 6, dim: int = 384, heads: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, VOCABULARY, bias=False)
        self._initialise(dim)

    def _initialise(self, dim: int) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.7 * dim**-0.5)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        # Every block starts as the identity, so that depth costs nothing in the first steps.
        for name, parameter in self.named_parameters():
            if name.endswith(("attention_out.weight", "down.weight")):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Scores (B, T, 256) of the byte after each of `tokens` (B, T), or, given `targets`, the mean loss in nats."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(self.norm(x)).float()
        if targets is None:
            return scores
        return F.cross_entropy(scores.flatten(0, 1), targets.flatten())
