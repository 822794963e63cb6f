"""What has arrived for one bucket and has not been reduced yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ds_zero.runtime.gradients.grad_buffer import FreshGrads, GradBuffer


class Arrivals:
    """Counts the gradients of one bucket's parameters in one backward, [Note: repeated arrivals]."""

    def __init__(self, num_params: int) -> None:
        self._expected = [1] * num_params
        """How often each parameter arrives in one backward, as far as is known."""
        self._seen = [0] * num_params
        self.missing = 0
        """Arrivals that the present backward still has to bring."""

    def begin(self, params: Sequence[Tensor]) -> None:
        """A backward begins."""
        self._seen = [0] * len(params)
        self.missing = sum(n for n, p in zip(self._expected, params, strict=True) if p.requires_grad)

    def count(self, index: int) -> None:
        """Parameter `index` has arrived."""
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
    """Of the present micro-batch, in their own dtype. After the end of a backward that was reduced: what arrived
    after the bucket had left."""
    local: GradBuffer | None = None
    """Sums over micro-batches that were not reduced, in the dtype of accumulation."""

    def clear(self) -> None:
        """Drop them."""
        self.fresh = self.local = None
