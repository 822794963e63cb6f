"""Linear layers of many experts in one call: the rows of each expert are multiplied by its own matrix.

Legend: E experts, M rows, I inputs, O outputs. Tensors are contiguous and of one dtype, fp32 or bf16; the rows of
experts follow each other in the order of experts, `sizes[e]` of them belong to expert e.

Order of sums: each element is one chain of multiply-adds in fp32, in the order of inputs (`forward`), of outputs
(`grad_input`) or of rows (`grad_weight`), rounded once to the dtype. So the bits of a row do not depend on other rows
or on the number of threads. With n terms the error is at most n u / (1 - n u) times the sum of their magnitudes,
u = 2^-24, and in bf16 one rounding of the result more.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ds_core import _native, threads
from ds_core.large_pages import in_large_pages
from ds_core.operators import Operator, Operators

MULTIPLE = 16
"""Of which the native kernels need numbers of inputs and outputs to be multiples."""

SMALL = 1 << 21
"""Multiply-adds of an expert, below which the call of a product costs more than better instructions gain."""


def is_native(dtype: torch.dtype, weight: Tensor) -> bool:
    """Whether there are native kernels for products in this dtype with such weights, (E, O, I) in any dtype."""
    _, outputs, inputs = weight.shape
    fits = dtype in (torch.float32, torch.bfloat16) and outputs % MULTIPLE == 0 and inputs % MULTIPLE == 0
    return fits and weight.device.type == "cpu" and _native.has_native()


def is_faster(num_rows: int, dtype: torch.dtype, weight: Tensor) -> bool:
    """Whether native kernels are faster than a product of torch for each expert, as measured (docs/benchmarks/moe.md):
    small products always are, large ones in fp32. For large ones in bf16, torch has better instructions.
    """
    _, outputs, inputs = weight.shape
    small = num_rows * outputs * inputs <= weight.shape[0] * SMALL
    return small or (dtype == torch.float32 and _native.core.cpu_target() != "baseline")


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> Tensor:
    """Returns (M, O): x_e W_e^T + b_e for the rows of each expert e.

    Args:
        x: (M, I).
        weight: (E, O, I).
        bias: (E, O); None: nothing is added.

    Raises:
        ValueError: tensors that do not fit.
    """
    if not is_native(x.dtype, weight):
        return reference(x, weight, bias, sizes)
    out: Tensor = _operators().call.grouped_linear(x, weight, bias, sizes)
    return out


def grad_input(grad: Tensor, weight: Tensor, sizes: Sequence[int]) -> Tensor:
    """Returns (M, I), the gradient of `x`.

    Args:
        grad: (M, O), the gradient of the output.
    """
    if not is_native(grad.dtype, weight):
        return torch.cat([rows @ weight[e] for e, rows in enumerate(grad.split(list(sizes)))])
    dx: Tensor = _operators().call.grouped_linear_grad_input(grad, weight, sizes)
    return dx


def grad_weight(grad: Tensor, x: Tensor, weight: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns (E, O, I) and (E, O), the gradients of `weight` and `bias`; zeros for experts without rows.

    Args:
        grad: (M, O), the gradient of the output.
        weight: for its shape.
    """
    if is_native(grad.dtype, weight):
        d_weight, d_bias = _operators().call.grouped_linear_grad_weight(grad, x, weight, sizes)
        return d_weight, d_bias
    d_weight = torch.empty_like(weight)
    d_bias = weight.new_empty(weight.shape[:2])
    of_experts = zip(grad.split(list(sizes)), x.split(list(sizes)), strict=True)
    for e, (grad_rows, rows) in enumerate(of_experts):
        torch.mm(grad_rows.t(), rows, out=d_weight[e])
        torch.sum(grad_rows, 0, out=d_bias[e])
    return d_weight, d_bias


@functools.cache
def _operators() -> Operators:
    """See `ds_core.operators`."""
    return Operators(
        {
            "grouped_linear(Tensor x, Tensor weight, Tensor? bias, int[] sizes) -> Tensor": Operator(
                _forward, _like_out, lambda x, weight, *_: x.numel() * weight.shape[1]
            ),
            "grouped_linear_grad_input(Tensor grad, Tensor weight, int[] sizes) -> Tensor": Operator(
                _grad_input, _like_input, lambda grad, weight, _: grad.numel() * weight.shape[2]
            ),
            "grouped_linear_grad_weight(Tensor grad, Tensor x, Tensor weight, int[] sizes) -> (Tensor, Tensor)": (
                Operator(_grad_weight, _like_weight, lambda grad, x, *_: grad.numel() * x.shape[1])
            ),
        }
    )


def _like_out(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> Tensor:
    return in_large_pages(x.new_empty(x.shape[0], weight.shape[1]))


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> Tensor:
    out = _like_out(x, weight, bias, sizes)
    _native.core.grouped_linear(x, weight, bias, sizes, *_inputs_outputs(weight), out, threads.count())
    return out


def _like_input(grad: Tensor, weight: Tensor, sizes: Sequence[int]) -> Tensor:
    return in_large_pages(grad.new_empty(grad.shape[0], weight.shape[2]))


def _grad_input(grad: Tensor, weight: Tensor, sizes: Sequence[int]) -> Tensor:
    dx = _like_input(grad, weight, sizes)
    _native.core.grouped_linear_grad_input(grad, weight, sizes, *_inputs_outputs(weight), dx, threads.count())
    return dx


def _like_weight(grad: Tensor, x: Tensor, weight: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    return in_large_pages(torch.empty_like(weight)), weight.new_empty(weight.shape[:2])


def _grad_weight(grad: Tensor, x: Tensor, weight: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    d_weight, d_bias = _like_weight(grad, x, weight, sizes)
    _native.core.grouped_linear_grad_weight(
        grad, x, sizes, *_inputs_outputs(weight), d_weight, d_bias, threads.count()
    )
    return d_weight, d_bias


def _inputs_outputs(weight: Tensor) -> tuple[int, int]:
    return weight.shape[2], weight.shape[1]


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> Tensor:
    """`forward` in plain torch, expert by expert."""
    return torch.cat(
        [
            functional.linear(rows, weight[e], bias[e] if bias is not None else None)
            for e, rows in enumerate(x.split(list(sizes)))
        ]
    )
