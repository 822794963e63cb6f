"""Block-sparse attention by the native kernel of ds_core, where that is installed."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ds_layers.sparse.plan import BlockPlan

if TYPE_CHECKING:
    from ds_core.block_attention import BlockRows


def is_native(q: Tensor, plan: BlockPlan) -> bool:
    """Whether ds_core is installed and has a kernel for these queries: floats on the CPU, sizes in multiples of
    16.
    """
    if q.device.type != "cpu" or importlib.util.find_spec("ds_core") is None:
        return False
    from ds_core import block_attention

    return block_attention.is_native(q, plan.block)


def native_block_sparse(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, *, scale: float, padding: Tensor | None = None
) -> Tensor:
    """As `ds_layers.sparse.blocks.block_sparse`, for `v` of the size of `k`."""
    from ds_core.block_attention import BlockRows

    rows = BlockRows(block=plan.block, offsets=plan.offsets, columns=plan.columns, causal=plan.causal)
    out: Tensor = _Native.apply(rows, scale, padding, q, k, v)  # type: ignore[no-untyped-call]
    return out


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: BlockRows, scale: float, padding: Tensor | None, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        from ds_core import block_attention

        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        padding = None if padding is None else padding.float()
        out, lse = block_attention.forward(q, k, v, rows, scale=scale, bias=padding)
        ctx.rows, ctx.scale = rows, scale
        ctx.save_for_backward(q, k, v, out, lse, padding)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        from ds_core import block_attention

        q, k, v, out, lse, padding = ctx.saved_tensors
        own = block_attention.backward(
            grads[0].contiguous(), (q, k, v), (out, lse), ctx.rows, scale=ctx.scale, bias=padding
        )
        return None, None, None, *own
