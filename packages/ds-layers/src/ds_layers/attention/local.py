"""Attention by torch's kernel, with the signature of `AttentionFn`."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention by `torch.nn.functional.scaled_dot_product_attention`. See `AttentionFn`.

    Args:
        mask: (batch or 1, heads or 1, query tokens, key tokens), True where a query attends to a key, or a number that
            is added to each product. It replaces `causal`.
        dropout: probability with which a weight is set to 0.
    """
    out = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def expanded_heads(x: Tensor, heads: int) -> Tensor:
    """Returns key or value heads repeated to `heads` heads: (batch, tokens, kv_heads, head_dim) -> (batch, tokens,
    heads, head_dim).

    Raises:
        ValueError: the numbers of heads do not divide each other.
    """
    if x.shape[2] == heads:
        return x
    if heads % x.shape[2]:
        raise ValueError(
            f"{heads} query heads cannot share {x.shape[2]} key heads: the first number must be a multiple of the "
            "second"
        )
    return x.repeat_interleave(heads // x.shape[2], 2)
