"""Which elements of a whole tensor one tensor-parallel rank holds: pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The part of a tensor that is divided along one dimension."""

    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    dim: int
    """The divided dimension."""
    index: int
    """Index of this rank."""
    size: int
    """Number of ranks."""
    blocks: int = 1
    """Number of equal sections of the dimension that are each divided, such as 3 for queries, keys and values in one
    weight."""

    def __post_init__(self) -> None:
        """Raises ValueError for sections that the ranks do not divide, or fewer elements than ranks."""
        length = self.shape[self.dim]
        if self.blocks > 1 and length % (self.blocks * self.size):
            raise ValueError(
                f"dimension {self.dim} of {self.shape} has {self.blocks} sections of {length / self.blocks:g}, which "
                f"{self.size} tensor-parallel ranks do not divide"
            )
        if length < self.size:
            raise ValueError(
                f"dimension {self.dim} of {self.shape} is shorter than {self.size} tensor-parallel ranks"
            )

    @property
    def bounds(self) -> tuple[int, int]:
        """The half-open range of this rank within a section."""
        section = self.shape[self.dim] // self.blocks
        return self.index * section // self.size, (self.index + 1) * section // self.size

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this rank's part."""
        begin, end = self.bounds
        local = list(self.shape)
        local[self.dim] = (end - begin) * self.blocks
        return tuple(local)

    def of(self, whole: Tensor) -> Tensor:
        """Returns a copy of this rank's part of a whole tensor."""
        begin, end = self.bounds
        sections = whole.unflatten(self.dim, (self.blocks, -1)).narrow(self.dim + 1, begin, end - begin)
        part: Tensor = sections.flatten(self.dim, self.dim + 1).contiguous().clone()
        return part

    def ranges(self, start: int, numel: int) -> Iterator[tuple[int, int]]:
        """Yields where elements [start, start + numel) of the flattened part are in the flattened whole tensor: (first
        element, number of elements), in order.
        """
        inner = math.prod(self.shape[self.dim + 1 :])
        section = self.shape[self.dim] // self.blocks
        begin, end = self.bounds
        run = (end - begin) * inner
        position, last = start, start + numel
        while position < last:
            number, offset = divmod(position, run)
            count = min(run - offset, last - position)
            yield (number * section + begin) * inner + offset, count
            position += count


def joined(parts: list[Tensor], cut: Cut) -> Tensor:
    """Returns the whole tensor from the parts of all ranks, in their order."""
    sections = [part.unflatten(cut.dim, (cut.blocks, -1)) for part in parts]
    return torch.cat(sections, cut.dim + 1).flatten(cut.dim, cut.dim + 1)
