"""`deepspeed.sequence.cross_entropy`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy


class _GatheredTokens(torch.autograd.Function):
    """Tokens of all ranks, along dimension 0; backward returns the gradient of this rank's."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any) -> Tensor:
        ctx.rank, ctx.tokens = dist.get_rank(group), own.shape[0]
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0][ctx.rank * ctx.tokens : (ctx.rank + 1) * ctx.tokens], None


def vocab_sequence_parallel_cross_entropy(
    vocab_seq_parallel_logits: Tensor, target: Tensor, sp_group: Any
) -> Tensor:
    """Returns the cross entropy of every token of the sequence, (tokens of all ranks, batch), on each rank.

    Args:
        vocab_seq_parallel_logits: (this rank's tokens, batch, vocabulary).
        target: (this rank's tokens, batch).
    """
    logits = vocab_seq_parallel_logits
    own = cross_entropy(logits.flatten(0, 1).float(), target.reshape(-1), reduction="none").view(target.shape)
    whole: Tensor = _GatheredTokens.apply(own, sp_group)  # type: ignore[no-untyped-call]
    return whole
