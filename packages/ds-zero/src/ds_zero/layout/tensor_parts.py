"""The parts of whole tensors that a tensor-parallel rank holds as parameters: pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

_SPAN_NUMEL = 4 * 2**20
"""Maximum number of elements that are read at a time to select those of a part."""


class TensorPart(Protocol):
    """The part of a whole tensor that one tensor-parallel rank holds as a parameter."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the part."""

    def ranges(self, start: int, numel: int) -> Iterator[tuple[int, int]]:
        """Yields where elements [start, start + numel) of the flattened part are in the flattened whole tensor: (first
        element, number of elements), in order.
        """


@dataclass(frozen=True, kw_only=True)
class TensorParts:
    """The parts of a model on one rank, [Note: logical tensors]."""

    parts: Mapping[str, TensorPart] = field(default_factory=dict)
    """Name of a parameter -> the part of it that this rank has; other parameters are whole."""
    first: bool = True
    """Whether this rank writes what all tensor-parallel ranks have."""


def spans(part: TensorPart, start: int, numel: int) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Yields ranges of the whole tensor that are read at once: (first element, number of elements, the ranges in it
    that belong to the part). Many short ranges are read together with what lies between them.
    """
    pieces: list[tuple[int, int]] = []
    for low, count in part.ranges(start, numel):
        if pieces and low + count - pieces[0][0] > _SPAN_NUMEL:
            yield _span(pieces)
            pieces = []
        pieces.append((low, count))
    if pieces:
        yield _span(pieces)


def _span(pieces: list[tuple[int, int]]) -> tuple[int, int, list[tuple[int, int]]]:
    start = pieces[0][0]
    return start, pieces[-1][0] + pieces[-1][1] - start, pieces
