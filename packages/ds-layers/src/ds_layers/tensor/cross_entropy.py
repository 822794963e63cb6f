"""Cross entropy of logits of which each tensor-parallel rank has a part of the vocabulary.

With z the logits and y the label: loss = log(sum(exp(z - m))) + m - z_y, where the maximum m, the sum and z_y are
exchanged: three numbers a token instead of the vocabulary. The gradient softmax(z) - onehot(y) needs no exchange.

Source: Shoeybi et al., Megatron-LM (arXiv:1909.08053), section 3.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor


def vocab_parallel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup,
    vocabulary: int,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """Returns the mean or sum of the cross entropy in fp32, the same on every rank. Collective.

    The mean is over tokens that have a label; it is 0 if there are none.

    Args:
        logits: (..., this rank's part of the vocabulary), as `ColumnParallelLinear` returns them.
        labels: (...), the same on every rank.
        group: the tensor-parallel ranks.
        vocabulary: size of the whole vocabulary, of which rank r of n has [r V // n, (r + 1) V // n).

    Raises:
        ValueError: logits of another size than this rank's part.
    """
    rank, size = group.rank(), group.size()
    begin, end = rank * vocabulary // size, (rank + 1) * vocabulary // size
    if logits.shape[-1] != end - begin or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}: rank {rank} of {size} has {end - begin} of "
            f"{vocabulary} logits of each label"
        )
    total: Tensor = _VocabParallel.apply(logits.flatten(0, -2), labels.flatten(), group, begin, ignore_index)  # type: ignore[no-untyped-call]
    return total / (labels != ignore_index).sum().clamp(min=1) if reduction == "mean" else total


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup, begin: int, ignore_index: int
    ) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        largest = wide.amax(1)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        counts = labels != ignore_index
        here = counts & (labels >= begin) & (labels < begin + logits.shape[1])
        index = (labels - begin).where(here, 0).unsqueeze(1)
        shifted = wide - largest.unsqueeze(1)
        own = shifted.gather(1, index).squeeze(1) * here
        sums = torch.stack([shifted.exp().sum(1), own])
        dist.all_reduce(sums, group=group)
        norm = sums[0].log()
        ctx.save_for_backward((shifted - norm.unsqueeze(1)).exp_(), index, here, counts)
        ctx.dtype = logits.dtype
        return ((norm - sums[1]) * counts).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        weights, index, here, counts = ctx.saved_tensors
        d_logits = weights * counts.unsqueeze(1)
        d_logits.scatter_add_(1, index, -here.to(d_logits.dtype).unsqueeze(1))
        return (d_logits * grads[0]).to(ctx.dtype), None, None, None, None
