"""Attention over some blocks of the attention matrix, on the CPU: forward and backward, without the matrix.

Tensors are fp32, bf16 or fp16; scores, weights and sums are fp32. Keys and values of 16 bits are widened once.

Tensors are contiguous: `q` and `out` (batch, heads, tokens, dim), `k` and `v` (batch, kv_heads, tokens, dim), `lse`
(batch, heads, tokens) in fp32. Each key head serves heads / kv_heads consecutive query heads. Block row r of head h
attends to blocks `columns[offsets[h * rows + r] : offsets[h * rows + r + 1]]`, with rows = tokens / block.

Sources: Dao et al., FlashAttention (arXiv:2205.14135), algorithms 1 and 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_core import _native, threads

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MULTIPLE = 16
"""Of which the native kernels need block sizes and head dimensions to be multiples."""


@dataclass(frozen=True, kw_only=True)
class BlockRows:
    """Which blocks each block row attends to."""

    block: int
    """Tokens in a block."""
    offsets: Tensor
    """int64, (heads x rows + 1): where the columns of each row begin."""
    columns: Tensor
    """int64: indices of blocks, each row's in any order."""
    causal: bool = False
    """Whether only the lower triangle of blocks on the diagonal counts."""


def is_native(q: Tensor, block: int) -> bool:
    """Whether there is a native kernel for these queries and block size."""
    fits = q.dtype in FLOATS and q.shape[-1] % MULTIPLE == 0 and block % MULTIPLE == 0
    return fits and q.device.type == "cpu" and _native.has_native()


def forward(
    q: Tensor, k: Tensor, v: Tensor, rows: BlockRows, *, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the output and the log-sum-exp of the scores of each query.

    Args:
        scale: factor of the products of queries and keys.
        bias: (batch, tokens) fp32, added to the scores of each key; finite.

    Raises:
        ValueError: tensors that do not fit.
    """
    if not is_native(q, rows.block):
        return reference(q, k, v, rows, scale=scale, bias=bias)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    tensors = (q, k, v, bias, rows.offsets, rows.columns)
    _native.core.block_attention_forward(
        tensors, _sizes(q, k, rows), scale, rows.causal, out, lse, threads.count()
    )
    return out, lse


def backward(
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor],
    rows: BlockRows,
    *,
    scale: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of `q`, `k` and `v`.

    Args:
        grad: gradient of the output.
        inputs: `q`, `k` and `v`.
        results: what `forward` returned.
    """
    q, k, v = inputs
    if not is_native(q, rows.block):
        with torch.enable_grad():
            own = [x.detach().requires_grad_() for x in inputs]
            out, _ = reference(own[0], own[1], own[2], rows, scale=scale, bias=bias)
            d_q, d_k, d_v = torch.autograd.grad(out, own, grad)
        return d_q, d_k, d_v
    d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    tensors = (q, k, v, bias, rows.offsets, rows.columns)
    grads = (results[0], results[1], grad, d_q, d_k, d_v)
    _native.core.block_attention_backward(
        tensors, _sizes(q, k, rows), scale, rows.causal, grads, threads.count()
    )
    return d_q, d_k, d_v


def reference(
    q: Tensor, k: Tensor, v: Tensor, rows: BlockRows, *, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`forward` in plain torch, with the whole matrix and a mask."""
    heads, tokens = q.shape[1], q.shape[2]
    count = tokens // rows.block
    layout = torch.zeros(heads * count, count, dtype=torch.bool, device=q.device)
    lengths = rows.offsets.diff()
    owner = torch.arange(heads * count, device=q.device).repeat_interleave(lengths)
    layout[owner, rows.columns] = True
    allowed = (
        layout.view(heads, count, count).repeat_interleave(rows.block, 1).repeat_interleave(rows.block, 2)
    )
    if rows.causal:
        index = torch.arange(tokens, device=q.device)
        same = index[:, None] // rows.block == index // rows.block
        allowed &= ~(same & (index > index[:, None]))
    sharing = heads // k.shape[1]
    scores = q @ k.repeat_interleave(sharing, 1).transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias[:, None, None]
    scores = scores.masked_fill(~allowed, -1e30)
    return scores.softmax(-1) @ v.repeat_interleave(sharing, 1), scores.logsumexp(-1)


def _sizes(q: Tensor, k: Tensor, rows: BlockRows) -> tuple[int, int, int, int, int, int]:
    batch, heads, tokens, dim = q.shape
    if tokens % rows.block:
        raise ValueError(
            f"block_attention: {tokens} tokens are not a multiple of the block size {rows.block}"
        )
    return batch, heads, k.shape[1], tokens // rows.block, rows.block, dim
