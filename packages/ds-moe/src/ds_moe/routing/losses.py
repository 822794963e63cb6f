"""Losses and measures of a router's balance.

Legend: T tokens, K choices of each, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_moe.dispatch.values import count_experts


def load(experts: Tensor, num_experts: int, used: Tensor | None = None) -> Tensor:
    """Returns (E,) int64, the number of tokens that chose each expert.

    Args:
        experts: (T, K).
        used: (T,) bool, tokens that count; None: all.
    """
    chosen = experts if used is None else experts[used]
    return count_experts(chosen.reshape(-1), num_experts)


def balance_loss(probs: Tensor, counts: Tensor, k: int) -> Tensor:
    """Returns E / K * sum over e of f_e P_e: 1 if all experts are loaded equally, and up to E / K otherwise.

    Args:
        probs: (T, E), rows sum to 1. P is its mean over tokens.
        counts: (E,), the tokens of each expert before any is dropped. f = counts / T has no gradient.

    Source: Fedus et al., Switch Transformer (JMLR 2022), equations 4 to 6.
    """
    tokens = max(probs.shape[0], 1)
    return (probs.sum(0) * counts.to(probs.dtype)).sum() * (probs.shape[1] / (k * tokens * tokens))


def z_loss(logits: Tensor) -> Tensor:
    """Returns the mean over tokens of logsumexp(logits)^2; 0 without tokens.

    Source: Zoph et al., ST-MoE (2022), equation 5.
    """
    return torch.logsumexp(logits, dim=-1).square().sum() / max(logits.shape[0], 1)


def entropy(probs: Tensor) -> Tensor:
    """Returns the sum over tokens of the entropy of their probabilities, in nats."""
    each: Tensor = torch.special.entr(probs)
    return each.sum()
