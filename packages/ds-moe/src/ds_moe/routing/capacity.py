"""Which of the tokens that chose an expert it takes, if it has room for only some.

Legend: T tokens, K choices of each, E experts, N = T K assignments. Nothing here has the size T E.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ds_moe.dispatch.values import count_experts
from ds_moe.options import DropPolicy


def capacity_of(num_tokens: int, num_experts: int, k: int, factor: float, min_capacity: int) -> int:
    """Returns the number of tokens that an expert takes from one rank: max(ceil(T K / E * factor), min_capacity)."""
    return max(math.ceil(num_tokens * k * factor / num_experts), min_capacity)


def keep(
    experts: Tensor,
    scores: Tensor,
    used: Tensor | None,
    *,
    num_experts: int,
    capacity: int,
    policy: DropPolicy,
    training: bool,
) -> Tensor:
    """Returns (T, K) bool: whether an assignment stays within its expert's capacity.

    Args:
        experts: (T, K), the experts of each token, the first choice first.
        scores: (T, K), by which the policy "probs" decides; equal scores stay in the order of `position`.
        used: (T,) bool, tokens that take part; others take no room and are not kept. None: all.
    """
    choices = experts.T.reshape(-1)  # all first choices come before second ones
    if used is not None:
        choices = torch.where(used.repeat(experts.shape[1]), choices, num_experts)
    order = _order(scores.detach().T.reshape(-1), policy if training or policy != "random" else "position")
    by_expert = choices if order is None else choices[order]
    sorted_experts, index = torch.sort(by_expert, stable=True)
    counts = count_experts(choices, num_experts + 1)
    rank_in_expert = torch.arange(choices.numel(), device=choices.device)
    rank_in_expert -= (counts.cumsum(0) - counts)[sorted_experts]
    kept = torch.empty_like(choices, dtype=torch.bool)
    kept[index if order is None else order[index]] = (rank_in_expert < capacity) & (
        sorted_experts < num_experts
    )
    return kept.view(experts.shape[1], experts.shape[0]).T


def _order(scores: Tensor, policy: DropPolicy) -> Tensor | None:
    """Returns the order in which assignments are offered to their experts; None: as they come."""
    if policy == "probs":
        return torch.argsort(scores, descending=True, stable=True)
    if policy == "random":
        return torch.randperm(scores.numel(), device=scores.device)
    return None
