"""From logits to chosen experts and their weights, as pure functions.

Legend: T tokens, K choices of each, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_moe.options import RouterOptions
from ds_moe.routing import losses
from ds_moe.routing.capacity import capacity_of, keep


@dataclass(frozen=True)
class Routing:
    """The experts of a batch of tokens."""

    experts: Tensor
    """(T, K) int64, the first choice first."""
    weights: Tensor
    """(T, K) fp32 with gradient: factors of the experts' outputs; 0 where the assignment was dropped."""
    kept: Tensor | None
    """(T, K) bool; None: no assignment was dropped."""
    counts: Tensor
    """(E,) int64: tokens that chose each expert, before any is dropped."""
    aux_loss: Tensor
    """Balance loss, plus the z-loss with its factor."""
    entropy: Tensor
    """Sum over tokens of the entropy of their probabilities, in nats; without gradient."""


def route(
    logits: Tensor,
    options: RouterOptions,
    *,
    training: bool,
    used: Tensor | None = None,
    bias: Tensor | None = None,
) -> Routing:
    """Chooses K experts for every token.

    Args:
        logits: (T, E) fp32.
        used: (T,) bool, tokens that take part; the others (padding) get weight 0. None: all.
        bias: (E,), added to scores for the choice, not in the weights.

    Source: Shazeer et al. (2017) for top-k; Lepikhin et al., GShard (2021), algorithm 1 for two choices with capacity;
        DeepSeek-V3 (2024), equations 12 to 16 for sigmoids, groups and biases.
    """
    scores = logits.softmax(-1) if options.score == "softmax" else logits.sigmoid()
    experts = choose(logits.detach(), scores.detach(), options, training=training, bias=bias)
    weights = scores.gather(1, experts)
    counts = losses.load(experts, options.num_experts, used)
    kept = used.unsqueeze(1).expand_as(experts) if used is not None else None
    if options.drop != "none":
        factor = options.capacity_factor if training else options.eval_capacity_factor
        kept = keep(
            experts,
            weights,
            used,
            num_experts=options.num_experts,
            capacity=capacity_of(
                logits.shape[0], options.num_experts, options.k, factor, options.min_capacity
            ),
            policy=options.drop,
            training=training,
        )
    if kept is not None:
        weights = weights * kept
    if options.normalizes:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).eps)
    probs = scores if options.score == "softmax" else scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)
    aux = losses.balance_loss(probs, counts, options.k)
    if options.z_loss:
        aux = aux + options.z_loss * losses.z_loss(logits)
    return Routing(experts, weights * options.scale, kept, counts, aux, losses.entropy(probs.detach()))


def choose(
    logits: Tensor, scores: Tensor, options: RouterOptions, *, training: bool, bias: Tensor | None = None
) -> Tensor:
    """Returns (T, K) int64, the experts of each token, best first. Equal scores choose in the order of `torch.topk`."""
    if training and options.noise == "rsample":
        return (logits + gumbel_like(logits)).argmax(-1, keepdim=True)
    ranked = scores if bias is None else scores + bias
    if options.num_groups > 1:
        ranked = _within_best_groups(ranked, options)
    if training and options.sample_second:
        first = ranked.argmax(-1, keepdim=True)
        noisy = (logits + gumbel_like(logits)).masked_fill(ranked == -torch.inf, -torch.inf)
        return torch.cat([first, noisy.scatter(1, first, -torch.inf).argmax(-1, keepdim=True)], 1)
    return ranked.topk(options.k, dim=-1).indices


def _within_best_groups(ranked: Tensor, options: RouterOptions) -> Tensor:
    """Sets the scores outside of a token's best groups to -inf. A group is as good as its two best experts together."""
    grouped = ranked.view(ranked.shape[0], options.num_groups, -1)
    of_group = grouped.topk(min(2, grouped.shape[2]), dim=-1).values.sum(-1)
    best = of_group.topk(options.groups_per_token, dim=-1).indices
    allowed = torch.zeros_like(of_group, dtype=torch.bool).scatter_(1, best, True)
    return grouped.masked_fill(~allowed.unsqueeze(-1), -torch.inf).view_as(ranked)


def gumbel_like(logits: Tensor) -> Tensor:
    """Returns standard Gumbel noise, with which the largest of noisy logits is a sample of their softmax."""
    uniform = torch.rand_like(logits).clamp_min_(torch.finfo(logits.dtype).tiny)
    return uniform.log_().neg_().clamp_min_(torch.finfo(logits.dtype).tiny).log_().neg_()
