"""A function of single tokens, such as an MLP, over one part of the sequence at a time.

The intermediate values of a long sequence are many times its hidden states. Here only those of one part exist at a
time: forward keeps the inputs of the parts, and backward recomputes one part after the other.

Source: Bekman et al. 2025, Arctic Long Sequence Training, section 3.1.2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def tiled_over_sequence(
    function: Callable[[Tensor], Tensor], x: Tensor, num_tiles: int, *, dim: int = -2
) -> Tensor:
    """`function(x)`, computed and recomputed in at most `num_tiles` parts along `dim`. Each token's output must depend
    on that token alone.

    Args:
        x: any shape; with the default `dim`, (..., tokens, features).
        num_tiles: parts of nearly equal size; fewer where there are fewer tokens.

    Raises:
        ValueError: less than one part.
    """
    if num_tiles < 1:
        raise ValueError(f"num_tiles is {num_tiles}: it has to be at least 1")
    parts = x.chunk(num_tiles, dim)
    if not torch.is_grad_enabled():
        return torch.cat([function(part) for part in parts], dim)
    outputs: list[Tensor] = [checkpoint(function, part, use_reentrant=False) for part in parts]
    return torch.cat(outputs, dim)
