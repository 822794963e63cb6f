"""The protocols between this package and owners of state, in torch types only.

An owner may use its own dataclasses, because only the attributes matter. `tests/contracts` runs one suite for every
owner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Coordinates = Mapping[str, tuple[int, int]]
"""Name of a mesh axis -> (index on it, size of it), for the axes along which the values under one name differ. An axis
along which all ranks hold the same values, or ranges of one logical tensor, does not appear."""

EVERYWHERE: Coordinates = MappingProxyType({})
"""Coordinates of a tensor whose values differ along no axis."""


@runtime_checkable
class StoredTensor(Protocol):
    """The values of a record that are not in memory. They are loaded when they are written, in the order of the
    records.
    """

    dtype: torch.dtype

    def numel(self) -> int:
        """Returns the number of elements."""

    def element_size(self) -> int:
        """Returns the bytes of one element."""

    def load(self) -> Tensor:
        """Returns the values, 1-D and contiguous; valid until the next `load` of a record."""


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
    def data(self) -> Tensor | StoredTensor:
        """1-D and contiguous; may be a view of the live tensor, or not be in memory."""

    @property
    def coordinates(self) -> Coordinates:
        """Which of the tensors of that name it is, where values differ along axes of the mesh."""


class RecordSource(Protocol):
    """A checkpoint from which an owner reads by logical name."""

    def states(
        self, fqn: str, coordinates: Coordinates = EVERYWHERE
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Returns state name -> (global shape, dtype) for a parameter or buffer; empty if the name is unknown.

        Raises an error that names the axes if the stored values differ along other axes, or along axes of other sizes.
        """

    def read(
        self, fqn: str, state: str, flat_offset: int, out: Tensor, coordinates: Coordinates = EVERYWHERE
    ) -> None:
        """Fills the 1-D `out` with elements [flat_offset, flat_offset + out.numel()), cast to its dtype."""


class RecordOwner(Protocol):
    """The owner of the state of a model and its optimizer."""

    def records(self) -> Sequence[ShardRecord]:
        """Returns the records that this rank writes. Over all ranks they contain every element of every logical
        tensor exactly once.
        """

    def load_records(self, source: RecordSource) -> None:
        """Loads this rank's ranges from `source`. Collective."""
