"""Norms that do not depend on how tensors are sharded.

[Note: norm in fixed blocks]
`torch.nn.utils.clip_grad_norm_` adds squares in fp32, tensor by tensor, with a relative error of up to 1e-5, and the
clip factor passes it on to every element. Here squares are added in fp64 over blocks of `BLOCK_NUMEL` elements, and
the sums of blocks by `math.fsum`, which is exact. Sharding tensors differently changes the fp64 sum by a relative 1e-16
or so, which disappears when the norm is rounded to fp32. So the norm does not depend on the number of shards.
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
    """Returns the sum of squares over all tensors in fp64, and whether all elements are finite. The default of
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
    """Returns the 2-norm of whole tensors as 0-dim fp32, computed as `ds_zero.clip_grad_norm_` does for shards."""
    return torch.tensor(math.sqrt(norms(tensors)[0]), dtype=torch.float32)


def combine(own: float, groups: Sequence[Ranks], device: torch.device) -> float:
    """Returns the sum of the ranks' sums of squares `own`: over the first group, then over the next, and so on.
    Collective.

    [Note: norm across ranks]
    This is the only exchange between ranks about the size of gradients. If the gradient of one rank contains an
    infinity or NaN, the sum on every rank is not finite, so that skipping a step needs no further message. If several
    ranks of a group hold the same parameter, only one of them includes its gradient in `own`.
    """
    total = own
    for ranks in groups:
        if ranks.group is None:
            continue
        # An all-reduce that only adds zeros to each rank's sum gathers all sums without rounding.
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
    """Returns `min(1, max_norm / (norm + 1e-6))` in fp32, as torch does; 1 if `max_norm` is 0, negative or infinite. A
    NaN norm gives NaN, as in torch.
    """
    if max_norm <= 0 or math.isinf(max_norm):
        return torch.ones((), dtype=torch.float32)
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)
