"""What a configuration says about reductions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ds_zero.interfaces import Reduction
from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.gradients.reduce_bucket import WirePolicy
from ds_zero.runtime.storage import GRAD


def require_whole_grads(buckets: Sequence[Bucket]) -> None:
    """Refuse reduction "none" where the optimizer would not find the whole gradients of this rank.

    Raises:
        ValueError: ranks own parts of gradients, or the store keeps gradients away.
    """
    for bucket in buckets:
        fqn = bucket.layout.slots[0].fqn
        if bucket.layout.num_owners > 1:
            raise ValueError(
                f'reduction="none" where ranks own parts of the masters (such as of {fqn!r}): an optimizer that '
                "reduces by itself needs whole gradients; shard with stage=0"
            )
        if bucket.storage.is_away(GRAD):
            raise ValueError(
                f'reduction="none" where the store keeps gradients away (such as of {fqn!r}): an optimizer that '
                "reduces by itself reads them all; use a store that keeps gradients in memory"
            )


@dataclass(frozen=True, kw_only=True)
class ReducePolicy:
    """When gradients are reduced."""

    reduction: Reduction
    """[Note: two plans]; "none": nobody but the optimizer reduces."""
    steps: int | None = None
    """Backwards between steps; None: as many as last time."""
    tree: bool = False
    """Add micro-batches in [Note: tree over micro-batches]."""
    overlap: bool = True
    """Whether backward goes on while a reduction travels."""
    ignore_unused: bool = True
    """Whether a parameter may stay without gradient."""
    grad_dtype: torch.dtype = torch.float32
    """Dtype in which micro-batches are added."""
    wire: WirePolicy = field(default_factory=WirePolicy)
