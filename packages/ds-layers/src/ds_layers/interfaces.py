"""The protocols of ds_layers, in torch types only."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class AttentionFn(Protocol):
    """Attention of queries to keys and values.

    Everything that changes how attention is computed has this signature: torch's kernel (`sdpa`), sequence parallelism
    (`Ulysses`, `RingAttention`), and block-sparse attention.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None) -> Tensor:
        """Returns (batch, tokens, heads, head_dim).

        Args:
            q: (batch, tokens, heads, head_dim).
            k, v: (batch, tokens, kv_heads, head_dim). Each key head serves heads / kv_heads consecutive query heads.
            causal: whether a token attends only to itself and to earlier tokens.
            scale: factor of the products of queries and keys; None: 1 / sqrt(head_dim).
        """
