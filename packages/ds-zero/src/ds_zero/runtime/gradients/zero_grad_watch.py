"""Tells that gradients were dropped while they waited to be reduced.

[Note: gradients that wait]
Under the local plan and in `no_sync` the optimizer's entries have no gradient until the sums of all micro-batches are
reduced, so `optimizer.zero_grad()` would find nothing to drop, and what waits would be added to the next step's
gradients: two models that train against each other do exactly that. So while sums wait, one entry shows a NaN as its
gradient. When it is gone, or zero, the sums are dropped as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_zero.tensors.storage import is_fake


class Flag:
    """The gradient that one of the optimizer's entries shows while sums wait."""

    def __init__(self) -> None:
        self._shard: Tensor | None = None
        self._shown: Tensor | None = None
        self._is_mine = False
        self._version = 0

    def raise_on(self, shards: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Show it, on an entry with elements if there is one; an entry that has a gradient stands for itself."""
        if self._shard is not None or not shards:
            return
        shard = next((s for s in shards if s.numel()), shards[0])
        self._shard, self._is_mine = shard, shard.grad is None
        if self._is_mine:
            shard.grad = torch.full((1,), float("nan"), dtype=dtype, device=shard.device).expand(shard.shape)
        self._shown = shard.grad
        self._version = shard.grad._version if shard.grad is not None else 0

    def lower(self) -> None:
        """The sums are about to be reduced, or gone."""
        if self.is_on(self._shard):
            assert self._shard is not None
            self._shard.grad = None
        self._shard = self._shown = None

    def is_on(self, shard: Tensor | None) -> bool:
        """Whether this entry's gradient is only the flag."""
        return shard is not None and shard is self._shard and self._is_mine and shard.grad is self._shown

    @property
    def dropped(self) -> bool:
        """Whether somebody has cleared the gradients since."""
        if self._shard is None:
            return False
        grad = self._shard.grad
        if grad is None:
            return True
        if is_fake(grad):
            return False  # has no values that anybody could have cleared
        if self.is_on(self._shard):
            return bool(grad.numel()) and not grad.isnan().any()
        # Zeros alone say nothing: a gradient may be zero. That somebody wrote them does.
        return grad._version != self._version and not grad.any()
