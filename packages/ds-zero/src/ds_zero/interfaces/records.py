"""The protocols of norms, checkpoints and initial values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor


class Norms(Protocol):
    """Returns the squared 2-norm of a list of tensors in fp64, and whether every element is finite."""

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[float, bool]: ...


Coordinates = Mapping[str, tuple[int, int]]
"""Name of a mesh axis -> (index on it, size of it), for the axes along which tensors of one name have different values.
Axes along which ranks hold the same values, or ranges of the same tensor, are not included."""

EVERYWHERE: Coordinates = MappingProxyType({})
"""Coordinates of a tensor that has the same values along all axes."""


class RecordSource(Protocol):
    """A checkpoint that is read by name and range. `ds_zero.load_records` reads exactly the ranges that this rank
    owns.
    """

    def states(
        self, fqn: str, coordinates: Coordinates = EVERYWHERE
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Returns the stored states of a parameter or buffer: name of the state -> (global shape, dtype). Empty if the
        checkpoint does not contain it.

        Raises an error that names the axes if the stored values differ along other axes, or along axes of other sizes.
        """

    def read(
        self, fqn: str, state: str, flat_offset: int, out: Tensor, coordinates: Coordinates = EVERYWHERE
    ) -> None:
        """Fills the 1-D `out` with elements [flat_offset, flat_offset + out.numel()) of the flattened tensor, cast to
        the dtype of `out`.
        """


class InitialValues(Protocol):
    """Provides the initial values of a parameter from `deferred_init` or `divided_init`."""

    stage: int | None
    """The stage that was passed to `deferred_init` or `divided_init`, or None."""

    def values(self, tensor: Tensor) -> Tensor:
        """Returns all values as a new tensor. Collective if ranks hold parts of them."""
        ...

    def place(self, tensor: Tensor) -> int:
        """Returns the index of the parameter in the order of construction, which is the same on every rank."""
        ...

    def hides(self, tensor: Tensor) -> bool:
        """Whether the parameter has no readable values at the moment."""
        ...

    def own(self, tensor: Tensor) -> Tensor | None:
        """Returns this rank's 1-D slice while the parameter is sharded; None if it has none."""
        ...
