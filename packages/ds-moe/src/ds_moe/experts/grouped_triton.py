"""The products of `grouped_linear` as kernels of Triton, for GPUs and dtypes for which torch has no grouped product.

They need triton (`INSTALLED`). Products are summed in fp32 in a fixed order, so a run can be repeated bit by
bit. Triton compiles the kernels at their first use on a GPU, which takes seconds once.

Legend: E experts, M rows, I inputs, O outputs.
"""

# Triton has no types, and its functions take none.
# mypy: disable-error-code="import-not-found,no-untyped-def,untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # the module can be imported all the same
    triton = tl = None

INSTALLED = triton is not None
"""Whether the kernels can be called."""
_jit = triton.jit if INSTALLED else (lambda function: function)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_COLUMNS, _DEPTH = 64, 32
_MOST_ROWS, _FEWEST_ROWS = 64, 16
"""Rows of a tile: tensor cores need 16, and experts with few rows would waste the rest of a large tile."""


@_jit
def _rows_kernel(
    a, b, bias, out, tiles, num_columns, depth, of_expert, of_column, of_depth,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out[m, n] = sum over k of a[m, k] b[e, n, k], for the rows m of a tile, which are those of expert e.

    `tiles` has rows of (expert, first row, end of the expert's rows); the last three numbers are strides of b.
    """
    tile = tl.program_id(0)
    expert = tl.load(tiles + 3 * tile).to(tl.int64)
    first = tl.load(tiles + 3 * tile + 1)
    end = tl.load(tiles + 3 * tile + 2)
    m = (first + tl.arange(0, ROWS)).to(tl.int64)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside_m, inside_n = m < end, n < num_columns
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, depth, DEPTH):
        k = begin + tl.arange(0, DEPTH)
        inside_k = k < depth
        x = tl.load(
            a + m[:, None] * depth + k[None, :], mask=inside_m[:, None] & inside_k[None, :], other=0.0
        )
        w = tl.load(
            b + expert * of_expert + n[None, :] * of_column + k[:, None] * of_depth,
            mask=inside_n[None, :] & inside_k[:, None],
            other=0.0,
        )
        total = tl.dot(x, w, total, input_precision=PRECISION)
    if HAS_BIAS:
        added = tl.load(bias + expert * num_columns + n, mask=inside_n, other=0.0)
        total += added[None, :].to(tl.float32)
    tl.store(
        out + m[:, None] * num_columns + n[None, :],
        total.to(out.dtype.element_ty),
        mask=inside_m[:, None] & inside_n[None, :],
    )


@_jit
def _weight_kernel(
    grad, x, out, bias_out, ends, outputs, inputs,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """out[e, o, i] = sum over the rows m of expert e of grad[m, o] x[m, i], and the sums of grad[m, o].

    `ends` has the first row of each expert, and behind it the end of the last one.
    """
    expert = tl.program_id(0)
    first, end = tl.load(ends + expert), tl.load(ends + expert + 1)
    o = tl.program_id(1) * OUT + tl.arange(0, OUT)
    i = tl.program_id(2) * IN + tl.arange(0, IN)
    inside_o, inside_i = o < outputs, i < inputs
    total = tl.zeros((OUT, IN), tl.float32)
    sums = tl.zeros((OUT,), tl.float32)
    for begin in range(first, end, ROWS):
        m = (begin + tl.arange(0, ROWS)).to(tl.int64)
        inside_m = m < end
        g = tl.load(
            grad + m[None, :] * outputs + o[:, None], mask=inside_m[None, :] & inside_o[:, None], other=0.0
        )
        rows = tl.load(
            x + m[:, None] * inputs + i[None, :], mask=inside_m[:, None] & inside_i[None, :], other=0.0
        )
        total = tl.dot(g, rows, total, input_precision=PRECISION)
        if HAS_BIAS:
            sums += tl.sum(g.to(tl.float32), 1)
    at = (expert.to(tl.int64) * outputs + o[:, None]) * inputs + i[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside_o[:, None] & inside_i[None, :])
    if HAS_BIAS:
        if tl.program_id(2) == 0:
            tl.store(bias_out + expert * outputs + o, sums.to(bias_out.dtype.element_ty), mask=inside_o)


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> Tensor:
    """Returns (M, O), with gradients.

    Args:
        x: (M, I), the rows of the experts one after the other.
        weight: (E, O, I).
        bias: (E, O).
        sizes: the number of rows of each expert.
    """
    return _Grouped.apply(x, weight, bias, sizes)  # type: ignore[no-any-return,no-untyped-call]


def _precision(dtype: torch.dtype) -> str:
    """fp32 is rounded to tf32 only where torch's own products are."""
    rounded = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if rounded else "ieee"


def _rows_of_tile(sizes: list[int]) -> int:
    mean = sum(sizes) / max(1, sum(size > 0 for size in sizes))
    return _MOST_ROWS if mean > _MOST_ROWS // 2 else _FEWEST_ROWS


def _tiles(sizes: list[int], rows: int, device: torch.device) -> Tensor:
    table, begin = [], 0
    for expert, size in enumerate(sizes):
        table += [(expert, first, begin + size) for first in range(begin, begin + size, rows)]
        begin += size
    return torch.tensor(table, dtype=torch.int32).view(-1, 3).to(device, non_blocking=True)


def _product(a: Tensor, b: Tensor, bias: Tensor | None, sizes: list[int], transposed: bool) -> Tensor:
    """Returns (M, O) for a (M, I) and b (E, O, I); with `transposed` (M, I) for a (M, O)."""
    column, depth = (2, 1) if transposed else (1, 2)
    out = a.new_empty(a.shape[0], b.shape[column])
    rows = _rows_of_tile(sizes)
    tiles = _tiles(sizes, rows, a.device)
    if tiles.shape[0]:
        _rows_kernel[tiles.shape[0], triton.cdiv(b.shape[column], _COLUMNS)](
            a, b, bias, out, tiles, b.shape[column], b.shape[depth],
            b.stride(0), b.stride(column), b.stride(depth),
            HAS_BIAS=bias is not None, PRECISION=_precision(a.dtype), ROWS=rows, COLUMNS=_COLUMNS, DEPTH=_DEPTH,
        )  # fmt: skip
    return out


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        return _product(x, weight, bias.contiguous() if bias is not None else None, sizes, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        sizes: list[int] = ctx.sizes
        grad = grad.contiguous()
        of_x = _product(grad, weight, None, sizes, True) if ctx.needs_input_grad[0] else None
        of_weight = of_bias = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            experts, outputs, inputs = weight.shape
            of_weight = weight.new_empty(experts, outputs, inputs)
            of_bias = weight.new_empty(experts, outputs) if ctx.needs_input_grad[2] else None
            ends = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32).to(x.device, non_blocking=True)
            _weight_kernel[experts, triton.cdiv(outputs, _COLUMNS), triton.cdiv(inputs, _COLUMNS)](
                grad, x, of_weight, of_bias, ends, outputs, inputs,
                HAS_BIAS=of_bias is not None, PRECISION=_precision(x.dtype),
                ROWS=_DEPTH, OUT=_COLUMNS, IN=_COLUMNS,
            )  # fmt: skip
        return of_x, of_weight if ctx.needs_input_grad[1] else None, of_bias, None
