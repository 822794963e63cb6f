"""The gradients of one bucket that autograd has computed and that have not been reduced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ds_zero.runtime.gradients.grad_buffer import FreshGrads, GradBuffer


class Arrivals:
    """Counts the gradients of one bucket's parameters in one backward, [Note: repeated arrivals]."""

    def __init__(self, num_params: int) -> None:
        self._expected = [1] * num_params
        """For each parameter, the largest number of arrivals in one backward so far."""
        self._seen = [0] * num_params
        self.missing = 0
        """Number of arrivals that are still expected in the present backward."""

    def begin(self, params: Sequence[Tensor]) -> None:
        """Called when a backward begins."""
        self._seen = [0] * len(params)
        self.missing = sum(n for n, p in zip(self._expected, params, strict=True) if p.requires_grad)

    def count(self, index: int) -> None:
        """Counts an arrival of the gradient of parameter `index`."""
        seen = self._seen[index] = self._seen[index] + 1
        if seen > self._expected[index]:
            self._expected[index] = seen
        else:
            self.missing -= 1


@dataclass
class Pending:
    """Gradients of one bucket that have not been reduced yet."""

    arrivals: Arrivals
    fresh: GradBuffer | FreshGrads | None = None
    """Gradients of the present micro-batch, in their own dtype. After the end of a backward that was reduced: those
    that arrived after the reduction of the bucket had started."""
    local: GradBuffer | None = None
    """Sums over micro-batches that were not reduced, in `grad_dtype`."""

    def clear(self) -> None:
        """Drops the gradients."""
        self.fresh = self.local = None
