"""Experts of which each tensor-parallel rank has a part: some of the inner features of every expert.

The first products give a rank its inner features, and the last one a summand of the outputs; the summands are added
over the ranks. All ranks have the same rows, and get the same outputs.

Source: Shoeybi et al., Megatron-LM (arXiv:1909.08053), section 3; Singh et al., DeepSpeed-TED (2023).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def copied(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns `rows`, which all ranks have; backward adds the gradients of all ranks."""
    return _Copied.apply(rows, group)  # type: ignore[no-any-return,no-untyped-call]


def summed(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns the sum over ranks; backward returns the gradient as it is."""
    return _Summed.apply(rows, group)  # type: ignore[no-any-return,no-untyped-call]


def with_bias(rows: Tensor, bias: Tensor | None, sizes: list[int]) -> Tensor:
    """Adds to the rows of each expert (n, H) its bias, a row of (E, H). Gradients are summed in a fixed order."""
    if bias is None:
        return rows
    return _AddBias.apply(rows, bias.to(rows.dtype), sizes)  # type: ignore[no-any-return,no-untyped-call]


def _added(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _added(grad, ctx.group), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _added(rows, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, bias: Tensor, sizes: list[int]) -> Tensor:
        ctx.lengths = torch.tensor(sizes, device=rows.device)
        return rows + bias.repeat_interleave(ctx.lengths, 0, output_size=rows.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.segment_reduce(grad.contiguous(), "sum", lengths=ctx.lengths, axis=0), None
