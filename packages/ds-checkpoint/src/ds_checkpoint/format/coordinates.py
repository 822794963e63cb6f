"""Mesh coordinates of a tensor: the axes of ranks along which the values under one name differ."""

from __future__ import annotations

from collections.abc import Iterable

from ds_checkpoint.errors import CheckpointError
from ds_checkpoint.interfaces import Coordinates


def merged(*parts: Coordinates) -> dict[str, tuple[int, int]]:
    """Merges the axes of several coordinates.

    Raises:
        ValueError: an index is outside of its axis.
    """
    whole = {axis: (index, size) for part in parts for axis, (index, size) in part.items()}
    for axis, (index, size) in whole.items():
        if not 0 <= index < size:
            raise ValueError(
                f"coordinate {index} is outside of the axis {axis!r} with {size} ranks, which are numbered from 0"
            )
    return whole


def hashable(coordinates: Coordinates) -> tuple[tuple[str, int, int], ...]:
    """Returns a hashable value that is equal for equal coordinates, whatever the order of axes."""
    return tuple(sorted((axis, index, size) for axis, (index, size) in coordinates.items()))


def text(coordinates: Coordinates) -> str:
    """Formats coordinates for messages: "expert 0 of 2"; empty without axes."""
    return ", ".join(f"{axis} {index} of {size}" for axis, index, size in hashable(coordinates))


def sizes(coordinates: Coordinates) -> dict[str, int]:
    """Returns name of each axis -> its size."""
    return {axis: size for axis, (_, size) in coordinates.items()}


def check_sizes(name: str, stored: Iterable[Coordinates], wanted: Coordinates) -> None:
    """Checks that the values of a tensor differ along the same axes in the checkpoint and in this job.

    Raises:
        CheckpointError: names the axis and both sizes.
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
                    "of axes along which a tensor is only sharded, or replicated, may change)"
                )
