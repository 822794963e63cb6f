"""The options of gradient reductions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ds_zero.interfaces import Reduction
from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.gradients.reduce_bucket import WirePolicy
from ds_zero.runtime.storage import GRAD


def require_whole_grads(buckets: Sequence[Bucket]) -> None:
    """Checks that reduction "none" is possible: every rank must hold whole gradients in memory.

    Raises:
        ValueError: ranks own parts of gradients, or the store keeps gradients away.
    """
    for bucket in buckets:
        fqn = bucket.layout.slots[0].fqn
        if bucket.layout.num_owners > 1:
            raise ValueError(
                f'reduction="none" is not possible if each rank owns a part of the masters (such as of {fqn!r}): an '
                "optimizer that reduces by itself needs whole gradients. Shard with stage=0"
            )
        if bucket.storage.is_away(GRAD):
            raise ValueError(
                f'reduction="none" is not possible if the store keeps gradients out of memory (such as of {fqn!r}): an '
                "optimizer that reduces by itself reads them all. Use a store that keeps gradients in memory"
            )


@dataclass(frozen=True, kw_only=True)
class ReducePolicy:
    """When and how gradients are reduced."""

    reduction: Reduction
    """"local" or "sharded": the accumulation plan, [Note: two accumulation plans]; "none": only the optimizer reduces.
    """
    steps: int | None = None
    """Number of backwards between two steps; None: as many as before the last step."""
    tree: bool = False
    """Whether micro-batches are added in the order of [Note: tree over micro-batches]."""
    overlap: bool = True
    """Whether reductions overlap with backward."""
    ignore_unused: bool = True
    """Whether a parameter may have no gradient."""
    grad_dtype: torch.dtype = torch.float32
    """Dtype in which gradients of micro-batches are added."""
    wire: WirePolicy = field(default_factory=WirePolicy)
    """How the messages of a reduction are computed and sent."""
