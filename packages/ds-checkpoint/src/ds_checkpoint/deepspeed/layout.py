"""The position of each parameter's elements in DeepSpeed's flat tensors: pure arithmetic.

Stages 1 and 2 concatenate the parameters of a group and divide the result into one part per rank; a parameter may
begin on one rank and end on another. Stage 3 divides every parameter into parts of ceil(numel / ranks) elements, pads
the last ones, and concatenates the parts of each rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ds_checkpoint.errors import CheckpointError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """Elements [flat_offset, flat_offset + numel) of a parameter, which begin at element `start` of the flat tensor
    `index` of a rank.
    """

    fqn: str
    flat_offset: int
    numel: int
    rank: int
    index: int
    start: int


def contiguous(
    groups: Sequence[Mapping[str, Shape]], slices: Sequence[Sequence[Mapping[str, tuple[int, int]]]]
) -> Iterator[Part]:
    """Stages 1 and 2.

    Args:
        groups: for each group, name -> shape.
        slices: for each rank and group, name -> (numel, start) of its part there.
    """
    for g, shapes in enumerate(groups):
        for fqn in shapes:
            at = 0
            for rank, of_rank in enumerate(slices):
                if fqn not in of_rank[g]:
                    continue
                numel, start = of_rank[g][fqn]
                yield Part(fqn, at, numel, rank, g, start)
                at += numel


def contiguous_slices(
    groups: Sequence[Mapping[str, Shape]],
    part_numel: Sequence[int],
    ranks: int,
    paddings: Sequence[Sequence[int]],
) -> list[list[dict[str, tuple[int, int]]]]:
    """Computes the argument `slices` of `contiguous`: parameters in order, divided at multiples of `part_numel[g]`.

    Args:
        paddings: for each group, the number of padding elements after each parameter; empty for none.
    """
    slices: list[list[dict[str, tuple[int, int]]]] = [[{} for _ in groups] for _ in range(ranks)]
    for g, shapes in enumerate(groups):
        at = 0
        for number, (fqn, shape) in enumerate(shapes.items()):
            end = at + math.prod(shape)
            for rank in range(ranks):
                low, high = max(at, rank * part_numel[g]), min(end, (rank + 1) * part_numel[g])
                if high > low:
                    slices[rank][g][fqn] = (high - low, low - rank * part_numel[g])
            at = end + (paddings[g][number] if number < len(paddings[g]) else 0)
    return slices


def divided(groups: Sequence[Mapping[str, Shape]], flats: Sequence[Sequence[int]]) -> Iterator[Part]:
    """Stage 3.

    Args:
        groups: for each group, name -> shape.
        flats: for each rank, the number of elements of its flat tensors, in order. A part never spans two of them.

    Raises:
        CheckpointError: the flat tensors are too small for the groups.
    """
    ranks = len(flats)
    for rank, sizes in enumerate(flats):
        index, start = 0, 0
        for shapes in groups:
            for fqn, shape in shapes.items():
                numel = math.prod(shape)
                part = -(-numel // ranks)
                while index < len(sizes) and start + part > sizes[index]:
                    index, start = index + 1, 0
                if index == len(sizes):
                    raise CheckpointError(
                        f"the flat tensors of rank {rank} end before {fqn!r}: it was written with another layout"
                    )
                have = max(0, min(part, numel - rank * part))
                if have:
                    yield Part(fqn, rank * part, have, rank, index, start)
                start += part
