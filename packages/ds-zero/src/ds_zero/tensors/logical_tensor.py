"""A tensor subclass with the shape of a whole tensor and the elements of this rank, for torch.distributed.checkpoint.

[Note: blocks of a range]
A rank has a contiguous range of the flattened tensor, but torch's checkpoints store rectangular blocks. A range of a
matrix consists of the end of a row, some whole rows, and the beginning of a row. With more dims, the end and the
beginning are split in the same way. So a range of an N-dim tensor is at most 2 N - 1 blocks, each of them contiguous in
memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

_aten = torch.ops.aten


@dataclass(frozen=True)
class Block:
    """A rectangular part of a tensor, which is a contiguous range of its elements."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)


def blocks(shape: Sequence[int], begin: int, end: int) -> Iterator[Block]:
    """Yields the blocks of the elements [begin, end) of a flattened tensor, in order; [Note: blocks of a range]."""
    if begin < end:
        yield from _blocks(tuple(shape), begin, end)


def _blocks(shape: tuple[int, ...], begin: int, end: int) -> Iterator[Block]:
    if not shape:
        yield Block((), ())
        return
    row = math.prod(shape[1:])
    first, head = divmod(begin, row)
    last, tail = divmod(end, row)
    if first == last:
        yield from _of_row(first, shape, head, tail)
        return
    if head:
        yield from _of_row(first, shape, head, row)
        first += 1
    if first < last:
        yield Block((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:]))
    if tail:
        yield from _of_row(last, shape, 0, tail)


def _of_row(row: int, shape: tuple[int, ...], begin: int, end: int) -> Iterator[Block]:
    for block in _blocks(shape[1:], begin, end):
        yield Block((row, *block.offsets), (1, *block.sizes))


Part = tuple[tuple[int, ...], Tensor, bool]
"""Offsets of a block, its live values, and whether this rank is the one that writes it. Plain types: torch copies them
for an asynchronous save."""


def parts(shape: Sequence[int], start: int, values: Tensor, written: tuple[int, int] | None) -> list[Part]:
    """The elements from `start` on as blocks; this rank writes those in the range `written` (None: none of them)."""
    if not math.prod(shape):
        return [((0,) * len(shape), values.view(tuple(shape)), written is not None)]
    begin, end = start, start + values.numel()
    low, high = written if written is not None else (end, end)
    made: list[Part] = []
    for first, last in ((begin, low), (low, high), (high, end)):
        at = first - start
        for block in blocks(shape, first, last):
            made.append((block.offsets, values[at : at + block.numel].view(block.sizes), first == low < high))
            at += block.numel
    return made


class LogicalTensor(Tensor):
    """Shape, dtype and device of a whole tensor, and blocks of it that are views of live memory. What
    torch.distributed.checkpoint asks of it can be answered; every other use raises.
    """

    blocks_held: list[Part]
    why_unsaved: str

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(
        cls, shape: Sequence[int], like: Tensor, held: Iterable[Part], why_unsaved: str = ""
    ) -> LogicalTensor:
        """A tensor of a whole shape, with the dtype and device of `like`.

        Args:
            why_unsaved: if not empty, a save raises a ValueError with this text.
        """
        made: LogicalTensor = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=like.dtype, device=like.device
        )
        made.blocks_held = list(held)
        made.why_unsaved = why_unsaved
        return made

    def __create_write_items__(self, fqn: str, obj: Any) -> list[WriteItem]:
        """Returns the blocks that this rank writes; called by torch's save planner."""
        from torch.distributed.checkpoint import planner
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties

        if self.why_unsaved:
            raise ValueError(f"{fqn}: {self.why_unsaved}")
        return [
            planner.WriteItem(
                index=MetadataIndex(fqn, torch.Size(offsets)),
                type=planner.WriteItemType.SHARD,
                tensor_data=planner.TensorWriteData(
                    chunk=_chunk(offsets, values),
                    properties=TensorProperties.create_from_tensor(values),
                    size=self.size(),
                ),
            )
            for offsets, values, written in self.blocks_held
            if written
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Returns the blocks that this rank reads; called by torch's load planner."""
        return [_chunk(offsets, values) for offsets, values, _ in self.blocks_held]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """Returns the values of a block, as a view of the live tensor."""
        for offsets, values, _ in self.blocks_held:
            if index.offset is not None and tuple(index.offset) == tuple(offsets):
                return values
        raise ValueError(f"{index.fqn}: this rank has no block at {index.offset}")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is _aten.detach.default:
            return args[0]
        if (
            func is _aten.new_empty.default
        ):  # a copy for an asynchronous save, which gets copies of the attributes
            like = torch.empty(0, dtype=args[0].dtype, device=(kwargs or {}).get("device", args[0].device))
            return cls.of(args[1], like, [])
        raise ValueError(
            f"{str(func.overloadpacket).removeprefix('aten.')}: this tensor has a rank's elements only, for "
            "torch.distributed.checkpoint. ds_zero.get_full(model, name, state) gives whole values"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LogicalTensor(shape={tuple(self.shape)}, dtype={self.dtype}, {len(self.blocks_held)} blocks)"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "an entry of ds_zero.dcp_state_dict cannot be pickled: pass the state dict to torch.distributed.checkpoint"
        )


def _chunk(offsets: Sequence[int], values: Tensor) -> ChunkStorageMetadata:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=values.size())
