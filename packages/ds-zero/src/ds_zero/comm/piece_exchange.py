"""Reduces a bucket directly from the gradients of autograd.

[Note: reduction without copying]
Copying gradients into a flat buffer reads and writes the whole model in every step, and needs new memory each time.
Here the parts of a gradient that belong to other ranks' slices are sent from the memory in which autograd stored
them: large parts as separate messages, the small parts of a slice together. Received parts are added to the own parts
in the order of [Note: ordered reduction], so the result is bitwise that of one flat message, and the same number of
bytes is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_zero.comm.direct import REDUCE_TAG, exchange, sum_tree
from ds_zero.comm.ranks import Ranks
from ds_zero.comm.works import Then
from ds_zero.interfaces import Work
from ds_zero.layout.buckets import BucketLayout, Piece, piece_of
from ds_zero.tensors.large_pages import in_large_pages

LARGE_NUMEL = 1 << 16
"""Number of elements from which copying a part costs more than a separate message."""


@dataclass(frozen=True)
class _Share:
    """The parts of every slot in one rank's slice."""

    large: tuple[tuple[int, Piece], ...]
    """(slot, piece) of the parts that are sent as separate messages."""
    small: tuple[tuple[int, Piece], ...]
    sizes: tuple[int, ...]
    """Number of elements of each message; the last message contains all small pieces."""
    gaps: tuple[tuple[int, int], ...]
    """Ranges of the slice that belong to no slot."""

    def messages(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Returns the messages from `grads` to the rank with this slice."""
        messages = [_part(grads, i, p) for i, p in self.large]
        if self.small:
            messages.append(torch.cat([_part(grads, i, p) for i, p in self.small]))
        return messages


def _part(grads: Sequence[Tensor], index: int, piece: Piece) -> Tensor:
    return grads[index][piece.start : piece.start + piece.numel]


def _share(layout: BucketLayout, rank: int) -> _Share:
    begin, end = layout.slice_range(rank)
    pieces = [(i, piece_of(slot, begin, end)) for i, slot in enumerate(layout.slots)]
    large = tuple((i, p) for i, p in pieces if p.numel >= LARGE_NUMEL)
    small = tuple((i, p) for i, p in pieces if 0 < p.numel < LARGE_NUMEL)
    sizes = [p.numel for _, p in large]
    if small:
        sizes.append(sum(p.numel for _, p in small))
    cut = [(max(a, begin) - begin, min(b, end) - begin) for a, b in layout.gaps()]
    return _Share(large, small, tuple(sizes), tuple((a, b) for a, b in cut if a < b))


class PieceReduce:
    """The messages of one bucket's reduction, [Note: reduction without copying]."""

    def __init__(self, layout: BucketLayout, ranks: Ranks) -> None:
        self._ranks = ranks
        self.num_ranks = ranks.size
        self._shares = [_share(layout, r) for r in range(ranks.size)]
        self.sent_numel = sum(sum(s.sizes) for r, s in enumerate(self._shares) if r != ranks.rank)
        """Number of elements that this rank sends in one reduction."""

    def start(self, out: Tensor, grads: Sequence[Tensor], mean: bool) -> Work:
        """Starts to sum or average `grads`, one flat tensor per slot, over the ranks. `out` receives this rank's
        slice of the result. `grads` must not be changed until the operation has finished.
        """
        rank, size, group = self._ranks.rank, self._ranks.size, self._ranks.group
        mine = self._shares[rank]
        received = in_large_pages(grads[0].new_empty(size - 1, sum(mine.sizes)))
        rows = [list(row.split(mine.sizes)) if mine.sizes else [] for row in received]
        sent: list[Tensor] = []  # must stay alive until it is sent, because the backend may not keep it alive

        def to(peer: int) -> list[Tensor]:
            messages = self._shares[peer].messages(grads)
            sent.extend(messages)
            return messages

        near = self._ranks.transport
        works = [] if group is None else exchange(to, lambda p: rows[p - (p > rank)], group, REDUCE_TAG, near)
        scale = 1.0 / size if mean else 1.0
        rows.insert(rank, mine.messages(grads))

        def add_up() -> None:
            _add_up(mine, rows, out, scale)
            rows.clear()  # frees the messages, even if the caller keeps the finished work
            sent.clear()

        return Then(works, add_up)


def _add_up(share: _Share, rows: list[list[Tensor]], out: Tensor, scale: float) -> None:
    """Sums the messages of all ranks, `rows`, into this rank's slice."""
    for number, (_, piece) in enumerate(share.large):
        target = out[piece.offset : piece.offset + piece.numel]
        sum_tree([row[number] for row in rows], target, scale)
    if share.small:
        total = out.new_empty(share.sizes[-1])
        sum_tree([row[-1] for row in rows], total, scale)
        targets = [out[p.offset : p.offset + p.numel] for _, p in share.small]
        torch._foreach_copy_(targets, list(total.split([p.numel for _, p in share.small])))
    for begin, end in share.gaps:
        out[begin:end].zero_()
