"""Block-sparse attention by torch's FlexAttention, for accelerators."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def _compiled() -> Callable[..., Tensor]:
    """FlexAttention computes the whole matrix unless it is compiled. Compiled once, for all shapes."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=True)
    return compiled


def block_mask(layout: Tensor, block: int, *, causal: bool, padding: Tensor | None) -> Any:
    """Returns the `BlockMask` of a layout.

    Args:
        layout: (heads, block rows, block columns), on the device of the queries.
        padding: (batch, tokens), added to the scores; keys with less than 0 do not count.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    table = layout.bool()
    kept = None if padding is None else padding >= 0

    def counts(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = table[head, query // block, key // block]
        if causal:
            allowed = allowed & (query >= key)
        return allowed if kept is None else allowed & kept[sample, key]

    tokens = table.shape[1] * block
    batch = None if kept is None else len(kept)
    return create_block_mask(counts, batch, len(table), tokens, tokens, device=layout.device)


def flex_block_sparse(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, *, scale: float, compiled: bool = True
) -> Tensor:
    """As `ds_layers.sparse.blocks.block_sparse`, with a mask from `block_mask`. Without `compiled` the whole matrix is
    computed, for tests.
    """
    from torch.nn.attention.flex_attention import flex_attention

    function: Any = _compiled() if compiled else flex_attention
    out: Tensor = function(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out
