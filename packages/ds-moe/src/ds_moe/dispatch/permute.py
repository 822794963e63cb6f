"""Permutations of rows with gradients, in which forward and backward only read by index: sums have a fixed order on
every device, and no row is added to atomically.

Legend: T tokens, K choices, n rows of kept assignments, M rows in memory, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_moe import native
from ds_moe.dispatch.plan import Permutation


def dispatch(hidden: Tensor, to: Permutation) -> Tensor:
    """Returns (n, H): the row of the token of each assignment, in the order of experts.

    Args:
        hidden: (T, H).
    """
    return _Dispatch.apply(hidden, to)  # type: ignore[no-any-return,no-untyped-call]


def combine(rows: Tensor, weights: Tensor, to: Permutation) -> Tensor:
    """Returns (T, H): for each token, the sum of its rows times their weights, choice by choice.

    Args:
        rows: (n, H), in the order of experts.
        weights: (T, K); those of dropped assignments have no effect.
    """
    return _Combine.apply(rows, weights.to(rows.dtype), to)  # type: ignore[no-any-return,no-untyped-call]


def spread(rows: Tensor, index: Tensor | None, num_rows: int) -> Tensor:
    """Returns (num_rows, H) with row i at index[i], and zeros elsewhere; `index` has no number twice. None: `rows`."""
    if index is None:
        return rows
    return _Spread.apply(rows, index, num_rows)  # type: ignore[no-any-return,no-untyped-call]


def collect(rows: Tensor, index: Tensor | None) -> Tensor:
    """Returns rows[index], the inverse of `spread`; `index` has no number twice. None: `rows`."""
    if index is None:
        return rows
    return _Collect.apply(rows, index)  # type: ignore[no-any-return,no-untyped-call]


def _native_sums(rows: Tensor) -> Any:
    """Returns ds_core's module of sums of rows if it has a kernel for these, else None."""
    sums = native.row_sums()
    return sums if sums is not None and sums.is_native(rows) else None


def _of_assignments(rows: Tensor, to: Permutation) -> Tensor:
    """Returns (T, K, H), the row of each assignment; zeros for dropped ones."""
    if not to.drops:
        return rows[to.row]
    whole = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return whole[to.row]


def _spread(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    if num_rows == index.numel():
        return torch.empty_like(rows).index_copy_(0, index, rows)
    return rows.new_zeros(num_rows, rows.shape[1]).index_copy_(0, index, rows)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, to: Permutation) -> Tensor:
        ctx.to = to
        return hidden.index_select(0, to.token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.to.row.shape[1] > 1 and (sums := _native_sums(grad)) is not None:
            return sums.forward(grad.contiguous(), ctx.to.row, None), None
        of_choices = _of_assignments(grad, ctx.to)
        return of_choices.squeeze(1) if of_choices.shape[1] == 1 else of_choices.sum(1), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, to: Permutation) -> Tensor:
        ctx.to = to
        ctx.save_for_backward(rows, weights)
        if (sums := _native_sums(rows)) is not None:
            return sums.forward(rows.contiguous(), to.row, weights.contiguous())  # type: ignore[no-any-return]
        of_choices = _of_assignments(rows, to)
        if of_choices.shape[1] == 1:
            return of_choices.squeeze(1) * weights
        # A batched product of such small matrices is slow.
        return of_choices.mul_(weights.unsqueeze(2)).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weights = ctx.saved_tensors
        to: Permutation = ctx.to
        if (sums := _native_sums(rows)) is not None:
            of_rows, of_weights = sums.backward(
                grad.contiguous(), rows.contiguous(), to.row, weights.contiguous()
            )
            return of_rows, of_weights, None
        of_rows = of_weights = None
        if ctx.needs_input_grad[0]:
            of_rows = grad.index_select(0, to.token) * weights.reshape(-1)[to.slot].unsqueeze(1)
        if ctx.needs_input_grad[1]:
            of_weights = _of_assignments(rows, to).mul_(grad.unsqueeze(1)).sum(2)
        return of_rows, of_weights, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
        ctx.index = index
        return _spread(rows, index, num_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.index), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.index, ctx.num_rows = index, rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _spread(grad, ctx.index, ctx.num_rows), None
