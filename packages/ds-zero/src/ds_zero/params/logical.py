"""Records of parameters of which tensor-parallel ranks hold parts, as records of whole tensors.

[Note: logical tensors]
A checkpoint contains whole tensors, so that it loads on any number of tensor-parallel ranks. A rank's part of a tensor
is several ranges of the flattened whole, and an element-wise optimizer state has the same ones. What all
tensor-parallel ranks hold alike (parameters that are not cut, buffers, numbers) is written by the first of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ds_zero.interfaces import EVERYWHERE, Coordinates, RecordSource
from ds_zero.layout.tensor_parts import TensorPart, TensorParts, spans
from ds_zero.params.stored_values import StoredTensor

if TYPE_CHECKING:
    from ds_zero.params.records import ShardRecord

Reading = tuple[str, str, Coordinates, int, int]
"""One read from a source: (name, state, coordinates, first element, number of elements)."""


def whole_records(parts: TensorParts, own: Iterable[ShardRecord]) -> Iterator[ShardRecord]:
    """Yields the records of whole tensors that this rank writes, for records of its parts.

    Raises:
        ValueError: an optimizer state of a part is neither a number nor element-wise.
    """
    for record in own:
        part = parts.parts.get(record.fqn)
        if part is None or not record.global_shape:
            if parts.first:
                yield record
            continue
        if tuple(record.global_shape) != tuple(part.local_shape):
            raise ValueError(
                f"{record.fqn!r} is divided among tensor-parallel ranks, and its optimizer state {record.state!r} "
                f"of shape {tuple(record.global_shape)} is not element-wise: use an element-wise optimizer such as "
                "AdamW"
            )
        ranges = list(part.ranges(record.flat_offset, record.data.numel()))
        for (start, _), data in zip(ranges, split_of(record.data, [n for _, n in ranges]), strict=True):
            yield replace(record, global_shape=tuple(part.shape), flat_offset=start, data=data)


def split_of(data: Tensor | StoredTensor, counts: Sequence[int]) -> Iterator[Tensor | StoredTensor]:
    """Yields consecutive parts of the values of a record."""
    for end, count in zip(accumulate(counts), counts, strict=True):
        begin = end - count
        if isinstance(data, Tensor):
            yield data[begin:end]
        else:
            yield StoredTensor(count, data.dtype, _slice_of(data.load, begin, end))


def _slice_of(load: Callable[[], Tensor], begin: int, end: int) -> Callable[[], Tensor]:
    return lambda: load()[begin:end]


class LogicalSource:
    """A source of whole tensors as a source of this rank's parts."""

    def __init__(self, source: RecordSource, parts: Mapping[str, TensorPart]) -> None:
        self._source, self._parts = source, parts

    def states(
        self, fqn: str, coordinates: Coordinates = EVERYWHERE
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """See `RecordSource`. States of the shape of the whole tensor have the shape of this rank's part."""
        stored, part = self._source.states(fqn, coordinates), self._parts.get(fqn)
        if part is None:
            return stored
        return {
            name: (tuple(part.local_shape) if tuple(shape) == tuple(part.shape) else tuple(shape), dtype)
            for name, (shape, dtype) in stored.items()
        }

    def read(
        self, fqn: str, state: str, flat_offset: int, out: Tensor, coordinates: Coordinates = EVERYWHERE
    ) -> None:
        """See `RecordSource`."""
        part = self._part_of(fqn, state, coordinates)
        if part is None:
            self._source.read(fqn, state, flat_offset, out, coordinates)
            return
        position = 0
        for start, numel, pieces in spans(part, flat_offset, out.numel()):
            span = torch.empty(numel, dtype=out.dtype, device=out.device)
            self._source.read(fqn, state, start, span, coordinates)
            for low, count in pieces:
                out[position : position + count].copy_(span[low - start : low - start + count])
                position += count

    def readings(self, local: Iterator[Reading]) -> Iterator[Reading]:
        """Yields the reads from the source for reads from this one."""
        for fqn, state, coordinates, first, numel in local:
            part = self._part_of(fqn, state, coordinates)
            if part is None:
                yield fqn, state, coordinates, first, numel
                continue
            for start, length, _ in spans(part, first, numel):
                yield fqn, state, coordinates, start, length

    def _part_of(self, fqn: str, state: str, coordinates: Coordinates) -> TensorPart | None:
        part = self._parts.get(fqn)
        if part is None:
            return None
        shape, _ = self._source.states(fqn, coordinates)[state]
        return part if tuple(shape) == tuple(part.shape) else None
