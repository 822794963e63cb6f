"""The product of each expert's rows with its own matrix: y_e = x_e W_e^T + b_e.

Legend: E experts of this rank, M rows in memory, I inputs, O outputs.

Five ways, of which `grouped_linear` chooses by layout, device and dtype:
  native     the CPU kernels of ds_core, where that is installed: fp32 and small products in bf16, sizes that are
             multiples of 16
  grouped    `torch.nn.functional.grouped_mm`, on accelerators: bf16, and sizes that are multiples of 16 bytes
  triton     kernels of Triton, on GPUs, for what the one before does not take, if Triton and a C compiler are there
  padded     every expert has as many rows in memory: one batched product
  segments   a product for each expert, into its part of one output
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ds_moe import native
from ds_moe.dispatch.plan import Layout


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, groups: Layout) -> Tensor:
    """Returns (M, O).

    Args:
        x: (M, I), the rows of the experts as `groups` says.
        weight: (E, O, I).
        bias: (E, O).
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype) if bias is not None else None
    if not groups.padded and x.dtype == weight.dtype and is_native(x.shape[0], x.dtype, weight):
        return _Native.apply(x, weight, bias, groups.sizes)  # type: ignore[no-any-return,no-untyped-call]
    if groups.padded:
        return _Padded.apply(x, weight, bias)  # type: ignore[no-any-return,no-untyped-call]
    if _has_kernel(x, weight):
        return _by_kernel(x, weight, bias, groups)
    if x.is_cuda and x.dtype == weight.dtype and (kernels := _triton()) is not None:
        if x.dtype in kernels.DTYPES:
            return kernels.grouped_linear(x, weight, bias, groups.sizes)  # type: ignore[no-any-return]
    return _Segments.apply(x, weight, bias, groups.sizes)  # type: ignore[no-any-return,no-untyped-call]


def reference_linear(x: Tensor, weight: Tensor, bias: Tensor | None, groups: Layout) -> Tensor:
    """The same by `linear` for each expert: the oracle of tests."""
    lengths = [groups.padded] * len(groups.sizes) if groups.padded else groups.sizes
    return torch.cat(
        [
            functional.linear(rows, weight[e], bias[e] if bias is not None else None)
            for e, rows in enumerate(x.split(lengths))
        ]
    )


def is_native(num_rows: int, dtype: torch.dtype, weight: Tensor) -> bool:
    """Whether ds_core has kernels for a product in this dtype, and they are faster than torch's products one by one."""
    grouped = native.grouped()
    if grouped is None or not grouped.is_native(dtype, weight):
        return False
    return bool(grouped.is_faster(num_rows, dtype, weight))


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    aligned = x.shape[1] % 8 == 0 and weight.shape[1] % 8 == 0
    return x.is_cuda and x.dtype == torch.bfloat16 and aligned and hasattr(functional, "grouped_mm")


@functools.cache
def _triton() -> ModuleType | None:
    """Returns the kernels of Triton; None where it is not installed, or cannot build what launches its kernels."""
    compilers = (os.environ.get("CC"), "cc", "gcc", "clang")
    if not any(shutil.which(name) for name in compilers if name):
        return None
    kernels = importlib.import_module("ds_moe.experts.grouped_triton")
    return kernels if kernels.INSTALLED else None


def _by_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, groups: Layout) -> Tensor:
    sizes = torch.tensor(groups.sizes, device=x.device)
    ends = sizes.cumsum(0).to(torch.int32)
    product = functional.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    if bias is None:
        return product
    return product + bias.repeat_interleave(sizes, 0, output_size=x.shape[0])


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> Tensor:
        grouped = native.grouped()
        assert grouped is not None
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        out: Tensor = grouped.forward(x, weight.contiguous(), bias, sizes)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        grouped = native.grouped()
        assert grouped is not None
        x, weight = ctx.saved_tensors
        grad, weight = grad.contiguous(), weight.contiguous()
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = grouped.grad_input(grad, weight, ctx.sizes)
        if ctx.needs_input_grad[1]:
            of_weight, of_bias = grouped.grad_weight(grad, x, weight, ctx.sizes)
        elif ctx.needs_input_grad[2]:
            of_bias = torch.segment_reduce(grad, "sum", lengths=torch.tensor(ctx.sizes), axis=0)
        return of_x, of_weight, of_bias if ctx.needs_input_grad[2] else None, None


class _Padded(torch.autograd.Function):
    """The gradient of the weight comes in the weight's own layout, which autograd would copy it into otherwise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        batches = x.view(weight.shape[0], -1, weight.shape[2])
        out = torch.bmm(batches, weight.transpose(1, 2))
        if bias is not None:
            out += bias.unsqueeze(1)  # baddbmm copies the bias to every row first
        return out.view(x.shape[0], weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        batches = grad.reshape(weight.shape[0], -1, weight.shape[1])
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = torch.bmm(batches, weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            of_weight = torch.bmm(batches.transpose(1, 2), x.view(weight.shape[0], -1, weight.shape[2]))
        if ctx.needs_input_grad[2]:
            of_bias = batches.sum(1)
        return of_x, of_weight, of_bias


class _Segments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        out = x.new_empty(x.shape[0], weight.shape[1])
        for e, (rows, to) in enumerate(zip(x.split(sizes), out.split(sizes), strict=True)):
            if bias is None:
                torch.mm(rows, weight[e].t(), out=to)
            else:
                torch.addmm(bias[e], rows, weight[e].t(), out=to)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        of_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        of_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        of_bias = grad.new_empty(weight.shape[:2]) if ctx.needs_input_grad[2] else None
        begin = 0
        for e, size in enumerate(ctx.sizes):
            part = slice(begin, begin + size)
            begin += size
            if of_x is not None:
                torch.mm(grad[part], weight[e], out=of_x[part])
            if of_weight is not None:
                torch.mm(grad[part].t(), x[part], out=of_weight[e])
            if of_bias is not None:
                torch.sum(grad[part], 0, out=of_bias[e])
        return of_x, of_weight, of_bias, None


class CurrentGroups:
    """The layout of the rows that are passing through a stack of experts; its grouped layers share it."""

    def __init__(self) -> None:
        self.layout: Layout | None = None
        """None outside of a forward of the stack."""


class GroupedLinear(torch.nn.Module):
    """`nn.Linear` of every expert: stacked weights, applied to each expert's rows."""

    def __init__(self, like: torch.nn.Linear, num_experts: int, current: CurrentGroups) -> None:
        """
        Args:
            like: a layer with the sizes, dtype, device and `requires_grad` of the new one's parameters.
        """
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        self._current = current
        self.weight = stacked_like(like.weight, num_experts)
        self.bias: torch.nn.Parameter | None
        self.register_parameter(
            "bias", stacked_like(like.bias, num_experts) if like.bias is not None else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """From (M, I) to (M, O)."""
        layout = self._current.layout
        assert layout is not None, "a grouped layer is called by its stack of experts"
        return grouped_linear(x, self.weight, self.bias, layout)

    def extra_repr(self) -> str:
        """Returns the sizes."""
        return f"{self.weight.shape[0]} experts, {self.in_features}, {self.out_features}, bias={self.bias is not None}"


def stacked_like(param: Tensor, num_experts: int) -> torch.nn.Parameter:
    """Returns an uninitialised parameter with a leading dimension for experts."""
    return torch.nn.Parameter(param.new_empty(num_experts, *param.shape), requires_grad=param.requires_grad)
