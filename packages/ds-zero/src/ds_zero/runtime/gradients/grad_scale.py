"""What the gradients on the shards still have to be multiplied by, and their norm once it is known.

[Note: units of a gradient]
With a loss scale S, backward leaves S g on the shards, and clipping finds a factor c. One multiply by c / S
does both: inside the pass of an optimizer that has `step_fused`, in place for others. S is a power of two
unless somebody chose another number, so that dividing by it loses nothing and the order does not matter.
Whoever reads a gradient before the step multiplies it by `Pending.factor()`.
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
    """Global 2-norm of one step's gradient: over all shards and ranks, of true (unscaled) values."""

    before: float
    """Before clipping; inf or NaN where an element of the gradient is."""
    after: float
    """After clipping; the same where there was none."""

    @property
    def finite(self) -> bool:
        """Whether every element of the gradient is finite."""
        return math.isfinite(self.before)


class Pending:
    """[Note: units of a gradient]; the same on every rank."""

    def __init__(self) -> None:
        self.loss_scale = 1.0
        """What losses are multiplied by before backward: the S of the note."""
        self.clip: Tensor | None = None
        """0-dim fp32: what clipping found and the next step multiplies in; None once it is in the gradients."""
        self.unscaled = False
        """Whether the gradients on the shards have been divided by the loss scale already."""
        self.norm: GradNorm | None = None
        """Of the gradients on the shards; None where they have changed since."""
        self.last_norm: GradNorm | None = None
        """Of the last gradients that were measured, kept after the step."""

    def factor(self) -> Tensor:
        """What turns the gradients on the shards into those that the optimizer shall see: 0-dim fp32, CPU."""
        clip = torch.ones((), dtype=torch.float32) if self.clip is None else self.clip
        return clip if self.unscaled or self.loss_scale == 1.0 else clip * (1.0 / self.loss_scale)

    def applied(self) -> None:
        """The gradients on the shards have been multiplied by `factor()`."""
        self.clip, self.unscaled = None, True

    def rejoin(self) -> float:
        """What brings the gradients on the shards, clipped, into the units in which backward adds to them."""
        back = self.loss_scale if self.unscaled else 1.0
        return back if self.clip is None else back * float(self.clip)

    def reset(self) -> None:
        """The gradients on the shards are gone or new."""
        self.clip, self.unscaled, self.norm = None, False, None

    def found(self, norm: GradNorm) -> None:
        """Keep what was measured of the present gradients."""
        self.norm = self.last_norm = norm


class ShardGrads:
    """The gradients on the shards of some buckets, and what they still have to be multiplied by."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self._buckets = buckets
        self.pending = Pending()

    def begin_accumulation(self) -> None:
        """A backward begins after clipping or a step: bring what stays on the shards into the units of backward."""
        self._multiply(self.pending.rejoin())
        self.pending.reset()

    def apply(self) -> None:
        """Make the gradients on the shards those that the optimizer shall see, [Note: units of a gradient]."""
        self._multiply(float(self.pending.factor()))
        self.pending.applied()

    def _multiply(self, factor: float) -> None:
        if factor == 1.0:
            return
        paged = [b for b in self._buckets if b.storage.is_away(GRAD)]
        here = [b for b in self._buckets if not b.storage.is_away(GRAD)]
        with torch.no_grad():
            _multiply(here, factor)
            with closing(visit(paged, (GRAD,), write=(GRAD,))) as visited:
                for bucket in visited:
                    _multiply([bucket], factor)


def _multiply(buckets: Sequence[Bucket], factor: float) -> None:
    grads = [s.grad for b in buckets for s in b.shards if s.grad is not None]
    if grads:
        torch._foreach_mul_(grads, factor)
