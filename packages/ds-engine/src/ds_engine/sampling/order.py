"""What the loader asks of an order of samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol


class Order(Protocol):
    """Indices of this rank's micro-batches. Positions are counted in units (samples, or lists of them) over all ranks
    together, so that they mean the same on any number of ranks.
    """

    num_samples: int
    epoch: int
    """Passes before this one."""
    start: int
    """Units of this pass that were seen before."""

    @property
    def together(self) -> int:
        """Units that all ranks together take for one micro-batch each."""

    @property
    def total(self) -> int:
        """Units of the present pass."""

    @property
    def goes_on(self) -> bool:
        """Whether a new iterator goes on where the last one stood, instead of beginning a new pass."""

    def __iter__(self) -> Iterator[list[int]]: ...

    def __len__(self) -> int:
        """Micro-batches that are left of the pass on this rank."""

    def samples_at(self, position: int) -> int | None:
        """Samples, over all ranks, of the optimizer step to which the unit at `position` belongs; None: as many as the
        configuration says.
        """

    def told(self, position: int) -> Mapping[str, Any]:
        """What a `post_process_func` is told of the unit at `position`."""

    def passed(self, position: int) -> None:
        """Units before `position` were given out, and will not be asked for again."""

    def state_dict(self, position: int) -> dict[str, Any]:
        """What goes into a checkpoint beside the position."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the order of `state`; ValueError: it is another one."""
