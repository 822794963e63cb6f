"""A tensor that is kept between steps: always in memory, or away and in memory only while it is open.

[Note: tensors that are away]
A tensor is *away* if `ShardStore.reserve` returned no tensor for its key, because the store keeps the values where they
cannot be addressed, for example on a disk. Opening it loads the values into a staging buffer. Closing it writes them
back, if they were changed.

The pieces of such a tensor (the optimizer's entries, or their gradients) are the same tensor objects all the time; only
their `data` changes. While the tensor is open, they are views of the buffer. While it is closed, each piece is a
stride-0 view of a NaN of its own, like a sharded parameter. Reading it gives NaN, and in-place arithmetic raises.
torch permits `zero_` and `fill_` on such views, but they change the version of the piece, which is checked at the next
opening: a gradient that was set to zero is then zero, and any other write raises.

The parameters of stage 3 keep one storage that is resized instead ([Note: one storage object]), because autograd saves
views of it. It saves no optimizer entries, so that a few buffers can serve all buckets, and a step allocates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from ds_zero.interfaces import ShardKey, Work

Cut = Callable[[Tensor], list[Tensor]]
"""Splits a 1-D tensor over the owned range into its pieces, one for each parameter."""


def second_key(key: ShardKey) -> ShardKey:
    """Returns the key of the second version of a tensor, [Note: two versions of a tensor]."""
    # After "+", as further partial sums: a store keeps it where it keeps the first one.
    return ShardKey(name=f"{key.name}+second version", kind=key.kind)


class Resting(Protocol):
    """A 1-D tensor that is kept between steps."""

    tensor: Tensor | None
    """The tensor itself; None if it is away."""
    pieces: Sequence[Tensor]
    """Views of it that are optimizer entries or gradients, the same objects for its whole life; may be empty."""

    def opened(self, *, write: bool = False, load: bool = True) -> AbstractContextManager[Tensor]:
        """Context manager that provides the values in memory.

        Args:
            write: store the values when the context is left without an exception.
            load: False if every element will be written before it is read.
        """
        ...

    def prefetch(self) -> None:
        """Starts to load the values, for an `opened` that follows soon."""
        ...

    def abandon(self) -> None:
        """Undoes `prefetch` if the tensor has not been opened since."""
        ...

    def fill(self, values: Tensor) -> None:
        """Sets all values, rounded to the tensor's dtype."""
        ...

    def read_into(self, out: Tensor) -> Work:
        """Starts to copy the values into `out`, which has the same dtype."""
        ...

    def put_grad(self, part: Tensor, *, offset: int, accumulate: bool) -> None:
        """Starts to write `part` at element `offset`, or to add it there. `part` must not be changed afterwards, and
        the tensor must not be read before `settle`.
        """
        ...

    lent: Tensor | None
    """The buffer that `lend` has returned, until it is stored or taken back."""

    def lend(self, device: torch.device) -> Tensor | None:
        """Returns memory on `device` for all values, which `put_grad` then stores without a copy; None if there is
        none. A `put_grad` of other values must be preceded by `take_back`.
        """
        ...

    def take_back(self) -> None:
        """Undoes `lend`."""
        ...

    def settle_puts(self) -> None:
        """Waits for `put_grad`, unless the values are in a buffer of this object."""
        ...

    def rounded(self, part: Tensor) -> Tensor:
        """Returns `part` in the dtype of the tensor, on the device where its values are in memory."""
        ...

    def showing(self, values: Tensor) -> AbstractContextManager[None]:
        """Context manager within which the pieces are views of `values`, which are those that the tensor has. It does
        nothing for a tensor in memory.
        """
        ...

    def begin_tentative(self) -> None:
        """From now on values are stored beside those before, [Note: two versions of a tensor]. Does nothing for a
        tensor in memory.
        """
        ...

    def keep(self) -> None:
        """Makes tentative values final."""
        ...

    def revert(self) -> None:
        """Drops tentative values."""
        ...

    def stamp(self) -> tuple[int, ...]:
        """Returns numbers that change with every write to the tensor or to one of its pieces by torch."""
        ...

    def settle(self) -> None:
        """Waits for the operation in progress, if there is one."""
        ...

    def take_zeroed(self) -> frozenset[int]:
        """Returns the indices of the pieces that were set to zero while the tensor was closed, once for each write."""
        ...
