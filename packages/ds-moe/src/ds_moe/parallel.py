"""Sends tokens to the ranks of their experts and back, around any function that computes experts.

Legend: T tokens of this rank, K choices, E experts of the layer, H hidden size, n rows.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ds_moe.dispatch.exchange import Exchange, ExpertGroup, Traffic
from ds_moe.dispatch.permute import collect, combine, dispatch, spread
from ds_moe.dispatch.plan import permutation, segment_index

RunExperts = Callable[[Tensor, list[int]], Tensor]
"""From the rows of this rank's experts (n, H), in the order of experts, and their numbers, to their outputs (n, H)."""


def run_experts(
    hidden: Tensor,
    experts: Tensor,
    weights: Tensor,
    kept: Tensor | None,
    *,
    num_experts: int,
    run: RunExperts,
    to: ExpertGroup,
    traffic: Traffic,
    meanwhile: Callable[[], Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns (T, H), the weighted sums of the experts' outputs, and the result of `meanwhile`. Collective among the
    ranks of `to`, each with its own tokens; T may be 0.

    Args:
        hidden: (T, H).
        experts: (T, K).
        weights: (T, K).
        kept: (T, K) bool; None: all.
        meanwhile: computed while rows are on their way; forward and backward overlap with messages.
    """
    plan = permutation(experts, kept, num_experts)
    rows = dispatch(hidden, plan)
    if to.group is None:
        out = combine(run(rows, plan.sizes), weights, plan)
        return out, meanwhile() if meanwhile is not None else None
    table = to.counts(plan.sizes, hidden.device)
    local = num_experts // to.size
    send = [sum(plan.sizes[r * local : (r + 1) * local]) for r in range(to.size)]
    receive = [sum(sizes) for sizes in table]
    there = Exchange(to, send, receive, traffic)
    started = there.start(rows)
    beside = meanwhile() if meanwhile is not None else None
    arrived = there.finish(started)
    index = segment_index(table, hidden.device)
    by_expert = spread(arrived, index, arrived.shape[0])
    outputs = collect(run(by_expert, [sum(column) for column in zip(*table, strict=True)]), index)
    back = Exchange(to, receive, send, traffic)
    return combine(back.finish(back.start(outputs)), weights, plan), beside
