"""Leaf modules: gathered whole, whatever part of them a rank uses.

[Note: leaf modules]
A mixture of experts calls different children on different ranks, so no child may gather anything of its own.
The leaf gathers all it contains before its forward; and whatever it returns needs a gradient, so that each rank
meets the leaf's backward, also one whose experts had nothing to do and whose input needs none. The reduction
counts missing gradients as zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


class _Tie(torch.autograd.Function):
    """Copies of tensors that depend on `anchor`, with no gradient for anything."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(t.clone() for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *(None for _ in grads)


def tie(output: object) -> Any:
    """`output` with every floating-point tensor that needs no gradient made to need one."""
    flat, spec = tree_flatten(output)
    places = [
        i
        for i, t in enumerate(flat)
        if isinstance(t, Tensor) and t.is_floating_point() and not t.requires_grad
    ]
    if not places:
        return output
    anchor = torch.zeros(0, requires_grad=True)
    tied = _Tie.apply(anchor, *(flat[i] for i in places))  # type: ignore[no-untyped-call]
    for i, tensor in zip(places, tied, strict=True):
        flat[i] = tensor
    return tree_unflatten(flat, spec)
