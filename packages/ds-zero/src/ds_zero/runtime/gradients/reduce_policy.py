"""What a configuration says about reductions."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ds_zero.interfaces import Reduction
from ds_zero.runtime.gradients.reduce_bucket import WirePolicy


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
