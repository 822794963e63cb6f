"""Detects that `zero_grad` was called while gradients had not been reduced.

[Note: dropped unreduced gradients]
Under the local plan and in `no_sync`, the optimizer's entries have no gradient until the sums of all micro-batches are
reduced. So `optimizer.zero_grad()` would have no effect on these sums, and they would be added to the next step's
gradients. Two models that train against each other clear each other's gradients in this way. Therefore one entry gets
a NaN as its gradient while there are unreduced sums: the flag. If the flag has been removed or set to zero, the sums
are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_zero.tensors.storage import is_fake


class Flag:
    """The NaN that is one entry's gradient while there are unreduced sums, [Note: dropped unreduced gradients]."""

    def __init__(self) -> None:
        self._shard: Tensor | None = None
        self._shown: Tensor | None = None
        self._is_mine = False
        self._version = 0

    def raise_on(self, shards: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Sets the flag on the first entry that has elements, else on the first entry. If that has a gradient already,
        the gradient serves as the flag.
        """
        if self._shard is not None or not shards:
            return
        shard = next((s for s in shards if s.numel()), shards[0])
        self._shard, self._is_mine = shard, shard.grad is None
        if self._is_mine:
            shard.grad = torch.full((1,), float("nan"), dtype=dtype, device=shard.device).expand(shard.shape)
        self._shown = shard.grad
        self._version = shard.grad._version if shard.grad is not None else 0

    def lower(self) -> None:
        """Removes the flag, before the sums are reduced or after they were dropped."""
        if self.is_on(self._shard):
            assert self._shard is not None
            self._shard.grad = None
        self._shard = self._shown = None

    def is_on(self, shard: Tensor | None) -> bool:
        """Whether the gradient of entry `shard` is the flag's NaN and not a real gradient."""
        return shard is not None and shard is self._shard and self._is_mine and shard.grad is self._shown

    @property
    def dropped(self) -> bool:
        """Whether the gradients have been cleared since the flag was set."""
        if self._shard is None:
            return False
        grad = self._shard.grad
        if grad is None:
            return True
        if is_fake(grad):
            return False  # a fake tensor has no values that could be cleared
        if self.is_on(self._shard):
            return bool(grad.numel()) and not grad.isnan().any()
        # A gradient may be zero without being cleared, so it must also have been written since.
        return grad._version != self._version and not grad.any()
