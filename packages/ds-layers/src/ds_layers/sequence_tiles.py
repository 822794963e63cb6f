"""Applies functions of single tokens, such as an MLP or a loss, to one part of the sequence at a time.

The intermediate values of a long sequence, such as its logits, are much larger than its hidden states. Here only those
of one part exist at a time: forward keeps the inputs of the parts, and backward recomputes one part after the other.

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
    """Returns `function(x)`, computed and recomputed in at most `num_tiles` parts along `dim`. The output for each
    token must depend only on that token.

    Args:
        x: any shape; with the default `dim`, (..., tokens, features).
        num_tiles: maximum number of parts, which have nearly equal sizes.

    Raises:
        ValueError: `num_tiles` is less than 1.
    """
    return torch.cat(outputs_of_tiles(function, [x], num_tiles, dim=dim), dim)


def tiled_loss(
    function: Callable[..., Tensor],
    *tensors: Tensor,
    num_tiles: int,
    reduction: Literal["mean", "sum"] = "mean",
    dim: int = 1,
) -> Tensor:
    """Returns the mean or sum of `function` over at most `num_tiles` parts of `tensors` along `dim`. The logits of the
    whole sequence are never in memory together.

    The mean gives every part the same weight. It equals the mean over tokens only if all parts have the same number of
    tokens that count. So if labels are masked, let `function` return a sum, use reduction "sum", and divide the result
    by the number of tokens.

    Args:
        function: returns a scalar for one part of each tensor, such as `lambda hidden, labels: ...`.
        tensors: (batch, tokens, ...), all with the same number of tokens.

    Raises:
        ValueError: `num_tiles` is less than 1, tensors have different lengths, or the reduction is unknown.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: it must be 'mean' or 'sum'")
    losses = torch.stack(outputs_of_tiles(function, tensors, num_tiles, dim=dim))
    return losses.mean() if reduction == "mean" else losses.sum()


def outputs_of_tiles(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], num_tiles: int, *, dim: int
) -> list[Tensor]:
    """Returns the outputs of `function` for the parts of `tensors` along `dim`, in order. Each is recomputed in
    backward.

    Raises:
        ValueError: `num_tiles` is less than 1, or tensors have different lengths.
    """
    if num_tiles < 1:
        raise ValueError(f"num_tiles is {num_tiles}: it must be at least 1")
    lengths = [tensor.shape[dim] for tensor in tensors]
    if len(set(lengths)) > 1:
        raise ValueError(f"the tensors have {lengths} tokens along dim {dim}: the numbers must be equal")
    # Contiguous, because functions may call view() on their input, which fails for a part of a longer sequence.
    parts = [[part.contiguous() for part in tensor.chunk(num_tiles, dim)] for tensor in tensors]
    tiles = list(zip(*parts, strict=True))
    if not torch.is_grad_enabled():
        return [function(*tile) for tile in tiles]
    return [checkpoint(function, *tile, use_reentrant=False) for tile in tiles]
