"""The protocol between the loader and an order of samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol


class Order(Protocol):
    """Yields the indices of this rank's micro-batches. Positions are counted in units (samples, or lists of them)
    over all ranks, so that they do not depend on the number of ranks.
    """

    num_samples: int
    epoch: int
    """Number of epochs before this one."""
    start: int
    """Number of units of this epoch that were already processed."""

    @property
    def together(self) -> int:
        """Number of units in one micro-batch of each rank, over all ranks."""

    @property
    def total(self) -> int:
        """Number of units of the current epoch."""

    @property
    def goes_on(self) -> bool:
        """Whether a new iterator continues where the last one stopped, instead of starting a new epoch."""

    def __iter__(self) -> Iterator[list[int]]: ...

    def __len__(self) -> int:
        """Number of remaining micro-batches of the epoch on this rank."""

    def samples_at(self, position: int) -> int | None:
        """Returns the number of samples, over all ranks, of the optimizer step with the unit at `position`; None: the
        configured number.
        """

    def told(self, position: int) -> Mapping[str, Any]:
        """Returns the information for `post_process_func` about the unit at `position`."""

    def passed(self, position: int) -> None:
        """Tells the order that units before `position` will not be requested again."""

    def state_dict(self, position: int) -> dict[str, Any]:
        """Returns the state for a checkpoint, except for the position."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state`. Raises ValueError if it belongs to another order."""
