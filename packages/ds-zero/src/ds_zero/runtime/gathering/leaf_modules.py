"""Leaf modules: modules that are gathered as a whole, whichever of their submodules a rank calls.

[Note: leaf modules]
In a mixture of experts, ranks call different submodules. Gathers are collective, so these submodules must not gather
their own parameters. Instead, the leaf module gathers all of its parameters before its forward. All of its outputs are
made to require a gradient, so that every rank runs the leaf's backward, also a rank whose experts received no tokens
and whose input requires no gradient. The reduction counts missing gradients as zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


class _Tie(torch.autograd.Function):
    """Copies tensors, so that the copies require a gradient like `anchor`. The backward computes no gradients."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(t.clone() for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *(None for _ in grads)


def tie(output: object) -> Any:
    """Returns `output`, with copies that require a gradient for all floating-point tensors that do not."""
    flat, spec = tree_flatten(output)
    indices = [
        i
        for i, t in enumerate(flat)
        if isinstance(t, Tensor) and t.is_floating_point() and not t.requires_grad
    ]
    if not indices:
        return output
    anchor = torch.zeros(0, requires_grad=True)
    tied = _Tie.apply(anchor, *(flat[i] for i in indices))  # type: ignore[no-untyped-call]
    for i, tensor in zip(indices, tied, strict=True):
        flat[i] = tensor
    return tree_unflatten(flat, spec)
