"""Attention to a part of the keys, with what merging several parts needs: the log-sum-exp of each row.

For scores s of one query, lse = log(sum(exp(s))). Outputs o_1 and o_2 over disjoint sets of keys are merged by
lse = logaddexp(lse_1, lse_2) and o = exp(lse_1 - lse) o_1 + exp(lse_2 - lse) o_2. The gradient of a part needs only the
final `o` and `lse`, since the weights of all keys are exp(s - lse).

All tensors are (batch, heads, tokens, head_dim), with as many key heads as query heads; lse is (batch, heads, tokens).

Source: Dao et al., FlashAttention (arXiv:2205.14135), section 3 and appendix B.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor]


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the output and the log-sum-exp. With `causal`, query i attends to keys 0 to i of this part.

    Args:
        mask: (batch or 1, heads or 1, query tokens or 1, key tokens), added to the scores.
    """
    if _has_cpu_kernel(q, v):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
        # Its layout is (batch, tokens, heads) in memory.
        return out, lse
    scores = _scores(q, k, causal, scale, mask)
    lse = scores.logsumexp(-1)
    return ((scores - lse.unsqueeze(-1)).exp() @ v.to(scores.dtype)).to(q.dtype), lse


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
    mask: Tensor | None = None,
) -> Gradients:
    """Returns the gradients of queries, keys and values for this part of the keys.

    Args:
        grad: gradient of the merged output.
        out, lse: the merged output and log-sum-exp over all parts.
    """
    if _has_cpu_kernel(q, v):
        grads: Gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
        )
        return grads
    weights = (_scores(q, k, causal, scale, mask) - lse.unsqueeze(-1)).exp()
    wide = weights.dtype
    grad = grad.to(wide)
    delta = (grad * out.to(wide)).sum(-1, keepdim=True)
    d_scores = weights * (grad @ v.to(wide).transpose(-1, -2) - delta) * scale
    return (
        (d_scores @ k.to(wide)).to(q.dtype),
        (d_scores.transpose(-1, -2) @ q.to(wide)).to(k.dtype),
        (weights.transpose(-1, -2) @ grad).to(v.dtype),
    )


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the output and log-sum-exp over both sets of keys; `out` is fp32."""
    total = torch.logaddexp(lse, other_lse)
    # Rows without keys in both sets have -inf, whose difference is not a number.
    first = torch.where(total.isneginf(), 0.0, (lse - total).exp()).unsqueeze(-1)
    second = torch.where(total.isneginf(), 0.0, (other_lse - total).exp()).unsqueeze(-1)
    return out * first + other.to(out.dtype) * second, total


def _has_cpu_kernel(q: Tensor, v: Tensor) -> bool:
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1] and q.dtype != torch.float64


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float, mask: Tensor | None) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
    if mask is not None:
        scores = scores + mask
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    return scores
