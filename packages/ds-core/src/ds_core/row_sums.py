"""Sums of rows that are chosen by index, with weights: how the outputs of experts become those of tokens.

Legend: S sums, K choices of each, M rows, H columns. Tensors are contiguous and of one dtype, fp32 or bf16, on a GPU
fp16, too. An index on a GPU is not checked, because reading it would wait for the device.

Each element of a sum is a chain of multiply-adds in fp32 in the order of choices, rounded once to the dtype: the error
is at most K u / (1 - K u) times the sum of magnitudes, u = 2^-24, and in bf16 one rounding of the result more.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ds_core import _gpu, _native, threads
from ds_core.operators import Operator, Operators

MULTIPLE = 16
"""Of which the native kernels need the number of columns to be a multiple."""


def is_native(rows: Tensor) -> bool:
    """Whether there are native kernels for sums of these rows."""
    if rows.shape[1] == 0 or rows.shape[1] % MULTIPLE:
        return False
    dtypes = (torch.float32, torch.bfloat16, *([] if rows.device.type == "cpu" else [torch.float16]))
    return rows.dtype in dtypes and _gpu.takes(rows)


def forward(rows: Tensor, index: Tensor, weights: Tensor | None) -> Tensor:
    """Returns (S, H): for each s the sum over k of weights[s, k] rows[index[s, k]].

    Args:
        rows: (M, H).
        index: (S, K) int64; M stands for no row.
        weights: (S, K); None: ones.

    Raises:
        ValueError: tensors that do not fit, or an index beyond the rows.
    """
    if not is_native(rows):
        return reference(rows, index, weights)
    out: Tensor = _operators().call.row_sums(rows, index, weights)
    return out


def backward(grad: Tensor, rows: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (M, H) and (S, K), the gradients of `rows` and `weights`.

    Args:
        grad: (S, H), the gradient of the sums.
        index: (S, K): every row has one place in it, as in a permutation with drops.
    """
    if not is_native(rows):
        with torch.enable_grad():
            own = [x.detach().requires_grad_() for x in (rows, weights)]
            d_rows, d_weights = torch.autograd.grad(reference(own[0], index, own[1]), own, grad)
        return d_rows, d_weights
    d_rows, d_weights = _operators().call.row_sums_grad(grad, rows, index, weights)
    return d_rows, d_weights


@functools.cache
def _operators() -> Operators:
    """See `ds_core.operators`."""
    return Operators(
        {
            "row_sums(Tensor rows, Tensor index, Tensor? weights) -> Tensor": Operator(
                _forward, _like_sums, lambda rows, index, _: index.numel() * rows.shape[1], on_gpu=True
            ),
            "row_sums_grad(Tensor grad, Tensor rows, Tensor index, Tensor weights) -> (Tensor, Tensor)": Operator(
                _backward,
                _like_grads,
                lambda grad, rows, index, _: 2 * index.numel() * rows.shape[1],
                on_gpu=True,
            ),
        }
    )


def _like_sums(rows: Tensor, index: Tensor, weights: Tensor | None) -> Tensor:
    return rows.new_empty(index.shape[0], rows.shape[1])


def _forward(rows: Tensor, index: Tensor, weights: Tensor | None) -> Tensor:
    out = _like_sums(rows, index, weights)
    _native.core.row_sums(rows, index, index.shape[1], rows.shape[1], weights, out, threads.count())
    return out


def _like_grads(grad: Tensor, rows: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(weights)


def _backward(grad: Tensor, rows: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    d_rows, d_weights = _like_grads(grad, rows, index, weights)
    choices, columns = index.shape[1], rows.shape[1]
    _native.core.row_sums_grad(
        grad, rows, index, choices, columns, weights, d_rows, d_weights, threads.count()
    )
    return d_rows, d_weights


def reference(rows: Tensor, index: Tensor, weights: Tensor | None) -> Tensor:
    """`forward` in plain torch."""
    of_choices = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])[index]
    if weights is not None:
        of_choices = of_choices * weights.unsqueeze(2)
    return of_choices.sum(1)
