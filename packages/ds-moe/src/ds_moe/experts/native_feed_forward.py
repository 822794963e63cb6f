"""Stacked feed-forward experts as one operation of autograd, by the kernels of ds_core: with small experts, what each
operation costs beside its arithmetic is most of the time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ds_moe import native
from ds_moe.experts.feed_forward import FeedForward
from ds_moe.experts.grouped_linear import GroupedLinear, is_native

if TYPE_CHECKING:
    from ds_core.grouped_feed_forward import Weights


def applies(expert: nn.Module, dtype: torch.dtype, num_rows: int) -> bool:
    """Whether `run` computes what calling `expert` would: it is a stacked `FeedForward` as it was made, without hooks
    or adapters, for which there are native kernels.
    """
    if type(expert) is not FeedForward or native.grouped_feed_forward() is None or _has_hooks(expert):
        return False
    with_grad = torch.is_grad_enabled()
    for layer in expert._modules.values():
        if layer is None:
            continue
        if type(layer) is not GroupedLinear or _has_hooks(layer):
            return False
        weight, bias = layer._parameters["weight"], layer._parameters["bias"]
        if weight is None or not is_native(num_rows, dtype, weight):
            return False
        # Gradients are computed for all parameters or for none.
        if with_grad and not (weight.requires_grad and (bias is None or bias.requires_grad)):
            return False
    return True


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def run(expert: FeedForward, rows: Tensor, sizes: list[int], *, last_bias: bool = True) -> Tensor:
    """Returns (n, H), the outputs of the experts.

    Args:
        rows: (n, H), in the order of experts.
        sizes: (E,).
        last_bias: whether the bias of the last product is added.
    """
    arguments: list[Tensor | None] = [rows]
    for layer in (expert.up, expert.gate, expert.down):
        arguments += [None, None] if layer is None else [layer.weight, layer.bias]
    if not last_bias:
        arguments[-1] = None
    if torch.is_autocast_enabled(rows.device.type):
        dtype = torch.get_autocast_dtype(rows.device.type)
        arguments = [x if x is None else x.to(dtype) for x in arguments]
    out: Tensor = _FeedForward.apply(expert.activation, sizes, *arguments)  # type: ignore[no-untyped-call]
    return out


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, activation: str, sizes: list[int], rows: Tensor, *parameters: Tensor | None
    ) -> Tensor:
        feed_forward = native.grouped_feed_forward()
        assert feed_forward is not None
        rows = rows.contiguous()
        of_layers = [x if x is None else x.contiguous() for x in parameters]
        weights: Weights = feed_forward.Weights(
            **dict(zip(("up", "up_bias", "gate", "gate_bias", "down", "down_bias"), of_layers, strict=True))
        )
        out, argument, factor = feed_forward.forward(rows, weights, sizes, activation)
        ctx.save_for_backward(rows, argument, factor, weights.up, weights.gate, weights.down)
        ctx.activation, ctx.sizes = activation, sizes
        return out  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        feed_forward = native.grouped_feed_forward()
        assert feed_forward is not None
        rows, argument, factor, *weights = ctx.saved_tensors
        of_rows, of_weights = feed_forward.backward(
            grad.contiguous(), rows, argument, factor, tuple(weights), ctx.sizes, ctx.activation
        )
        if factor is None:
            of_weights = [*of_weights[:2], None, None, *of_weights[2:]]
        needed = [x if need else None for x, need in zip(of_weights, ctx.needs_input_grad[3:], strict=True)]
        return None, None, of_rows, *needed
