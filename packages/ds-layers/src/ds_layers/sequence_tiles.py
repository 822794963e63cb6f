"""Functions of single tokens, such as an MLP or a loss, over one part of the sequence at a time.

The intermediate values of a long sequence, such as its logits, are many times its hidden states. Here only those of one
part exist at a time: forward keeps the inputs of the parts, and backward recomputes one part after the other.

Source: Bekman et al. 2025, Arctic Long Sequence Training, section 3.1.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

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
    return torch.cat(outputs_of_tiles(function, [x], num_tiles, dim=dim), dim)


def tiled_loss(
    function: Callable[..., Tensor],
    *tensors: Tensor,
    num_tiles: int,
    reduction: Literal["mean", "sum"] = "mean",
    dim: int = 1,
) -> Tensor:
    """The mean or sum of `function` over at most `num_tiles` parts of `tensors` along `dim`; no logits of the whole
    sequence exist.

    A mean counts every part alike, so it is the mean over tokens only where each part has as many of them: let
    `function` sum, and divide the result by the number of tokens, where labels are masked.

    Args:
        function: gives one number for a part of each tensor, such as `lambda hidden, labels: ...`.
        tensors: (batch, tokens, ...), all of one number of tokens.

    Raises:
        ValueError: less than one part, tensors of different lengths, or an unknown reduction.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: give 'mean' or 'sum'")
    losses = torch.stack(outputs_of_tiles(function, tensors, num_tiles, dim=dim))
    return losses.mean() if reduction == "mean" else losses.sum()


def outputs_of_tiles(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], num_tiles: int, *, dim: int
) -> list[Tensor]:
    """What `function` gives for the parts of `tensors` along `dim`, in order; each is recomputed in backward.

    Raises:
        ValueError: less than one part, or tensors of different lengths.
    """
    if num_tiles < 1:
        raise ValueError(f"num_tiles is {num_tiles}: it has to be at least 1")
    lengths = [tensor.shape[dim] for tensor in tensors]
    if len(set(lengths)) > 1:
        raise ValueError(f"the tensors have {lengths} tokens along dimension {dim}: it has to be one number")
    # Contiguous: functions look at their whole input by view(), which a part of a longer sequence does not allow.
    parts = [[part.contiguous() for part in tensor.chunk(num_tiles, dim)] for tensor in tensors]
    tiles = list(zip(*parts, strict=True))
    if not torch.is_grad_enabled():
        return [function(*tile) for tile in tiles]
    return [checkpoint(function, *tile, use_reentrant=False) for tile in tiles]
