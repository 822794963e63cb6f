"""What this package asks of those who own state, and offers to them, in torch types only.

An owner keeps dataclasses of its own: only the attributes count. `tests/contracts` runs every owner against one suite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor


class ShardRecord(Protocol):
    """Elements [flat_offset, flat_offset + data.numel()) of one flattened logical tensor, which this rank writes."""

    @property
    def fqn(self) -> str:
        """Name of the parameter or buffer."""

    @property
    def state(self) -> str:
        """Either "param", "buffer", or the optimizer's name of a state."""

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Shape of the whole logical tensor."""

    @property
    def flat_offset(self) -> int:
        """First element of `data` within the flattened tensor."""

    @property
    def data(self) -> Tensor:
        """1-D and contiguous; may be a view of the live tensor."""


class RecordSource(Protocol):
    """A checkpoint seen by logical name, as an owner reads it."""

    def states(self, fqn: str) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """State name -> (global shape, dtype) of what is stored for a parameter or buffer; empty if the name is
        unknown.
        """

    def read(self, fqn: str, state: str, flat_offset: int, out: Tensor) -> None:
        """Fill the 1-D `out` with elements [flat_offset, flat_offset + out.numel()), cast to its dtype."""


class RecordOwner(Protocol):
    """Whoever holds the state of a model and its optimizer."""

    def records(self) -> Sequence[ShardRecord]:
        """What this rank writes: over all ranks, every element of every logical tensor exactly once."""

    def load_records(self, source: RecordSource) -> None:
        """Read this rank's ranges from `source`. Collective."""
