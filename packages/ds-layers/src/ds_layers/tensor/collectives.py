"""Collectives between the regions of a tensor-parallel model, with their gradients.

Between a column-parallel and a row-parallel layer, ranks have different features. Outside, they have the same values
(or, with sequence-parallel norms, different tokens). Each function moves activations from one region to the other; its
gradient moves gradients back.

    function          forward                      backward
    copied            nothing                      all-reduce
    summed            all-reduce                   nothing
    joined_features   all-gather of the last dim   own part
    joined_tokens     all-gather of tokens         reduce-scatter of tokens, or own part
    scattered_tokens  reduce-scatter, or own part  all-gather of tokens

Source: Shoeybi et al., Megatron-LM (arXiv:1909.08053), section 3; Korthikanti et al., Reducing Activation Recomputation
(arXiv:2205.05198), section 4.2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TOKENS = 1
"""Dimension of the tokens: activations are (batch, tokens, features)."""


def copied(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns `x`, which all ranks have; backward adds the gradients of all ranks."""
    out: Tensor = _Copied.apply(x, group)  # type: ignore[no-untyped-call]
    return out


def summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns the sum over ranks; backward returns the gradient as it is."""
    out: Tensor = _Summed.apply(x, group)  # type: ignore[no-untyped-call]
    return out


def joined_features(x: Tensor, group: dist.ProcessGroup, sizes: list[int]) -> Tensor:
    """Returns the features of all ranks, (..., sum of `sizes`); backward returns this rank's part."""
    out: Tensor = _JoinedFeatures.apply(x, group, sizes)  # type: ignore[no-untyped-call]
    return out


def joined_tokens(x: Tensor, group: dist.ProcessGroup, *, partial: bool) -> Tensor:
    """Returns the tokens of all ranks.

    Args:
        partial: whether ranks use the result differently, so that backward adds their gradients.
    """
    out: Tensor = _JoinedTokens.apply(x, group, partial)  # type: ignore[no-untyped-call]
    return out


def scattered_tokens(x: Tensor, group: dist.ProcessGroup, *, partial: bool) -> Tensor:
    """Returns this rank's tokens.

    Args:
        partial: whether `x` is a summand of each rank, so that the sum is returned.
    """
    out: Tensor = _ScatteredTokens.apply(x, group, partial)  # type: ignore[no-untyped-call]
    return out


def check_tokens(tokens: int, size: int) -> None:
    """Raises ValueError if ranks cannot have equally many tokens."""
    if tokens % size:
        raise ValueError(
            f"{tokens} tokens cannot be divided among {size} tensor-parallel ranks for sequence-parallel norms: pad "
            f"sequences to a multiple of {size}, or set sequence_parallel to False"
        )


def _all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


def _gather_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, TOKENS)


def _own_tokens(x: Tensor, group: dist.ProcessGroup, partial: bool) -> Tensor:
    check_tokens(x.shape[TOKENS], group.size())
    parts = [part.contiguous() for part in x.chunk(group.size(), TOKENS)]
    if not partial:
        return parts[group.rank()].clone()
    # Sent directly and added in the order of ranks: gloo's reduce-scatter sends twice the bytes.
    arrived = [torch.empty_like(parts[0]) for _ in parts]
    dist.all_to_all(arrived, parts, group=group) if x.device.type != "cpu" else _exchange(
        arrived, parts, group
    )
    total = arrived[0]
    for part in arrived[1:]:
        total = total + part
    return total


def _exchange(arrived: list[Tensor], parts: list[Tensor], group: dist.ProcessGroup) -> None:
    out = torch.empty((len(parts), *parts[0].shape), dtype=parts[0].dtype)
    dist.all_to_all_single(out, torch.stack(parts), group=group)
    for target, part in zip(arrived, out, strict=True):
        target.copy_(part)


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _all_reduce(grads[0], ctx.group), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class _JoinedFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, sizes: list[int]) -> Tensor:
        ctx.sizes, ctx.rank = sizes, group.rank()
        # Parts of one size, since gloo gathers no others.
        largest = max(sizes)
        padded = torch.nn.functional.pad(x, (0, largest - x.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0].split(ctx.sizes, -1)[ctx.rank].contiguous(), None, None


class _JoinedTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, partial: bool) -> Tensor:
        ctx.group, ctx.partial = group, partial
        return _gather_tokens(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _own_tokens(grads[0], ctx.group, ctx.partial), None, None


class _ScatteredTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, partial: bool) -> Tensor:
        ctx.group = group
        return _own_tokens(x, group, partial)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _gather_tokens(grads[0], ctx.group), None, None
