"""Mesh coordinates of a tensor: the axes of ranks along which the values under one name differ."""

from __future__ import annotations

from collections.abc import Iterable

from ds_checkpoint.errors import CheckpointError
from ds_checkpoint.interfaces import Coordinates


def merged(*parts: Coordinates) -> dict[str, tuple[int, int]]:
    """One mapping of all axes.

    Raises:
        ValueError: an index that is not on its axis.
    """
    whole = {axis: (index, size) for part in parts for axis, (index, size) in part.items()}
    for axis, (index, size) in whole.items():
        if not 0 <= index < size:
            raise ValueError(
                f"coordinate {index} is not on the axis {axis!r} of size {size}, which counts from 0"
            )
    return whole


def hashable(coordinates: Coordinates) -> tuple[tuple[str, int, int], ...]:
    """Equal for equal coordinates, in whatever order the axes come."""
    return tuple(sorted((axis, index, size) for axis, (index, size) in coordinates.items()))


def text(coordinates: Coordinates) -> str:
    """For people, as "expert 0 of 2"; empty without axes."""
    return ", ".join(f"{axis} {index} of {size}" for axis, index, size in hashable(coordinates))


def sizes(coordinates: Coordinates) -> dict[str, int]:
    """Name of each axis -> its size."""
    return {axis: size for axis, (_, size) in coordinates.items()}


def check_sizes(name: str, stored: Iterable[Coordinates], wanted: Coordinates) -> None:
    """Refuse a tensor whose values differ along other axes in the checkpoint than in this job.

    Raises:
        CheckpointError: says which axis, and both sizes.
    """
    here = sizes(wanted)
    for coordinates in stored:
        there = sizes(coordinates)
        for axis in (*there, *here):
            written, running = there.get(axis, 1), here.get(axis, 1)
            if written != running:
                raise CheckpointError(
                    f"the values of {name} differ along the axis {axis!r}, which has size {written} in the checkpoint "
                    f"and {running} in this job: load it in a job with size {written} of the axis {axis!r} (the sizes "
                    "of axes along which a tensor is only divided, or the same, may change)"
                )
