"""Norms that do not depend on how tensors are cut.

[Note: norm in fixed blocks]
`torch.nn.utils.clip_grad_norm_` adds fp32 squares tensor by tensor and is off by up to 1e-5 relative; the
clip factor then reaches every element. Here squares are added in fp64 over blocks of `BLOCK_NUMEL` elements,
the block sums with `math.fsum`, which is exact. A different cut moves the fp64 sum by parts in 1e-16, which
rounding to fp32 hides: the number of shards does not change the norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ds_zero.comm.ranks import Ranks
from ds_zero.interfaces import Norms

BLOCK_NUMEL = 1 << 16


def squared_norm(tensors: Sequence[Tensor]) -> tuple[float, bool]:
    """Sum of squares over all tensors in fp64, and whether all elements are finite. The default of
    `shard(norms=...)`.
    """
    sums: list[Tensor] = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        for begin in range(0, flat.numel(), BLOCK_NUMEL):
            block = flat[begin : begin + BLOCK_NUMEL].double()
            sums.append(torch.dot(block, block))
    if not sums:
        return 0.0, True
    values = torch.stack(sums).tolist()
    if not all(math.isfinite(v) for v in values):
        return math.nan if any(math.isnan(v) for v in values) else math.inf, False
    return math.fsum(values), True


def total_norm(tensors: Sequence[Tensor], norms: Norms = squared_norm) -> Tensor:
    """2-norm of whole tensors, as `clip_grad_norm_` computes it of shards: a 0-dim fp32 tensor."""
    return torch.tensor(math.sqrt(norms(tensors)[0]), dtype=torch.float32)


def combine(own: float, groups: Sequence[Ranks], device: torch.device) -> float:
    """Sum of the ranks' sums of squares: over the first group, then over the next, and so on. Collective.

    [Note: where ranks meet] This is the only place where ranks tell each other about the size of gradients. A
    sum that is not finite stays so, therefore it also carries the news that some rank has an infinity or NaN:
    clipping and skipping a step need no other message. A rank that must not count twice in a group (a
    parameter that its members hold alike) leaves such pieces out of `own`.
    """
    total = own
    for ranks in groups:
        if ranks.group is None:
            continue
        # Adding zeros is exact, so this all-reduce gathers the ranks' sums without rounding.
        sums = torch.zeros(ranks.size, dtype=torch.float64)
        sums[ranks.rank] = total
        sums = sums.to(device)
        dist.all_reduce(sums, group=ranks.group)
        values = sums.tolist()
        if all(math.isfinite(v) for v in values):
            total = math.fsum(values)
        else:
            total = math.nan if any(math.isnan(v) for v in values) else math.inf
    return total


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """`min(1, max_norm / (norm + 1e-6))` in fp32, torch's rule; 1 where there is no limit. NaN norms give
    NaN, as in torch.
    """
    if max_norm <= 0 or math.isinf(max_norm):
        return torch.ones((), dtype=torch.float32)
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)
