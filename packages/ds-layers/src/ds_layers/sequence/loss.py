"""Losses of sequences that are divided among ranks.

[Note: gradients over data and sequence]
ZeRO divides the sum of gradients by the number of all ranks, data x sequence. A mean over the tokens of one group of
P sequence-parallel ranks therefore needs P times the gradient of each rank's part, so that the division gives the mean
over the data-parallel groups. The losses here return the mean on every rank, and P times the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from ds_layers.sequence.ulysses import Group, process_group


def mean_over_tokens(total: Tensor, count: Tensor | int, group: Group | None = None) -> Tensor:
    """Returns the mean loss of the tokens of all ranks of a group, on each of them. Collective.

    If no rank has a token that counts, the loss is 0, and so are its gradients.

    Args:
        total: scalar, the sum of the losses of this rank's tokens.
        count: number of this rank's tokens that count; may be 0.
        group: the sequence-parallel ranks. Default: all ranks.
    """
    mean: Tensor = _MeanOverTokens.apply(total, count, process_group(group))  # type: ignore[no-untyped-call]
    return mean


def sequence_parallel_cross_entropy(
    logits: Tensor, shifted_labels: Tensor, group: Group | None = None, *, ignore_index: int = -100
) -> Tensor:
    """Returns the mean cross entropy of the tokens of all ranks that have a label. Collective.

    Args:
        logits: (..., vocabulary) of this rank's tokens.
        shifted_labels: (...), for each token the next token of the sequence, which may be on another rank; so labels
            are shifted before the sequence is divided (`SequenceBatches`).
        group: the sequence-parallel ranks. Default: all ranks.
        ignore_index: the label of tokens that do not count.
    """
    labels = shifted_labels.reshape(-1)
    flat = logits.reshape(-1, logits.shape[-1])
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    total = cross_entropy(flat, labels, ignore_index=ignore_index, reduction="sum")
    return mean_over_tokens(total, (labels != ignore_index).sum(), group)


class _MeanOverTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, count: Tensor | int, group: dist.ProcessGroup | None) -> Tensor:
        # Counts above 2^24 are not exact in fp32.
        sums = torch.stack([total.detach().double(), torch.as_tensor(count, device=total.device).double()])
        ctx.size = 1
        if group is not None:
            ctx.size = group.size()
            dist.all_reduce(sums, group=group)
        tokens = sums[1].clamp(min=1)
        ctx.factor = ctx.size / tokens * (sums[1] > 0)  # [Note: gradients over data and sequence]
        return (sums[0] / tokens).to(total.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (grads[0] * ctx.factor).to(grads[0].dtype), None, None
