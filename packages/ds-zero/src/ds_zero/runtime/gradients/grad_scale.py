"""The factors that the gradients on the shards have not been multiplied by yet, and the gradient norm.

[Note: units of a gradient]
With a loss scale S, the gradients on the shards are S g for the true gradient g. Clipping computes a factor c. Both are
applied by one multiplication by c / S: inside the kernel of an optimizer that has `step_fused`, in place for others.
S is a power of two unless the user has set another number, so dividing by it is exact, and the order of the two does
not matter. Code that reads a gradient before the step must multiply it by `Pending.factor()`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.storage import GRAD, visit


@dataclass(frozen=True, kw_only=True)
class GradNorm:
    """Global 2-norm of one step's unscaled gradient, over all shards and ranks."""

    before: float
    """Before clipping; inf or NaN if an element of the gradient is."""
    after: float
    """After clipping; equal to `before` without clipping."""

    @property
    def finite(self) -> bool:
        """Whether every element of the gradient is finite."""
        return math.isfinite(self.before)


class Pending:
    """The pending factors of [Note: units of a gradient], the same on every rank."""

    def __init__(self) -> None:
        self.loss_scale = 1.0
        """The factor of losses before backward: S of the note."""
        self.clip: Tensor | None = None
        """0-dim fp32, c of the note; None if there is no clipping, or the gradients have been multiplied by it."""
        self.unscaled = False
        """Whether the gradients on the shards have been divided by the loss scale."""
        self.norm: GradNorm | None = None
        """Norm of the gradients on the shards; None if it is unknown or they have changed since."""
        self.last_norm: GradNorm | None = None
        """The last measured norm, which is kept after the step."""

    def factor(self) -> Tensor:
        """Returns c / S, as far as it has not been applied: 0-dim fp32 on the CPU."""
        clip = torch.ones((), dtype=torch.float32) if self.clip is None else self.clip
        return clip if self.unscaled or self.loss_scale == 1.0 else clip * (1.0 / self.loss_scale)

    def applied(self) -> None:
        """Notes that the gradients on the shards have been multiplied by `factor()`."""
        self.clip, self.unscaled = None, True

    def backward_factor(self) -> float:
        """Returns the factor that applies pending clipping and restores the loss scale, so that the next backward can
        add its scaled gradients.
        """
        scale = self.loss_scale if self.unscaled else 1.0
        return scale if self.clip is None else scale * float(self.clip)

    def reset(self) -> None:
        """Forgets all factors and the norm, since the gradients on the shards were dropped or are new."""
        self.clip, self.unscaled, self.norm = None, False, None

    def measured(self, norm: GradNorm) -> None:
        """Stores the norm of the present gradients."""
        self.norm = self.last_norm = norm


class ShardGrads:
    """The gradients on the shards of some buckets, with their pending factors."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self._buckets = buckets
        self.pending = Pending()

    def begin_accumulation(self) -> None:
        """Prepares gradients that were not cleared for a backward that adds to them: see `Pending.backward_factor`."""
        self._multiply(self.pending.backward_factor())
        self.pending.reset()

    def apply(self) -> None:
        """Multiplies the gradients on the shards by the pending factor, in place."""
        self._multiply(float(self.pending.factor()))
        self.pending.applied()

    def _multiply(self, factor: float) -> None:
        if factor == 1.0:
            return
        away = [b for b in self._buckets if b.storage.is_away(GRAD)]
        addressable = [b for b in self._buckets if not b.storage.is_away(GRAD)]
        with torch.no_grad():
            _multiply(addressable, factor)
            with closing(visit(away, (GRAD,), write=(GRAD,))) as visited:
                for bucket in visited:
                    _multiply([bucket], factor)


def _multiply(buckets: Sequence[Bucket], factor: float) -> None:
    grads = [s.grad for b in buckets for s in b.shards if s.grad is not None]
    if grads:
        torch._foreach_mul_(grads, factor)
