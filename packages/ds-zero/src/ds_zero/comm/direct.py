"""Collectives in which each rank sends directly to every other rank.

[Note: ordered reduction]
The ring and tree algorithms of communication libraries add in an order that depends on the number of ranks and on the
message size. Here every rank sends slice r to rank r, and rank r adds the received slices in fp32, in the order of a
fixed binary tree over rank indices. Each rank sends as many bytes as in a ring reduce-scatter, (N-1)/N of the buffer,
and the result depends only on the inputs.

[Note: direct exchange]
gloo's `all_gather_into_tensor` and `reduce_scatter_tensor` move each byte several times: for 32 MB of fp32 on 2 ranks
they took 2.8 and 9 times as long as sending each slice directly to the rank that needs it. Messages of gathers and of
reductions have different tags, so the order of the former does not matter for the latter. With a `Transport`, such as
the one of ds_comm, ranks on one machine send no messages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ds_zero.comm.ranks import Ranks
from ds_zero.comm.works import Done, Then
from ds_zero.interfaces import Capabilities, Transport, Work
from ds_zero.tensors.large_pages import in_large_pages
from ds_zero.tensors.storage import same_place

REDUCE_TAG, GATHER_TAG = 0x6A, 0x1000
SUM_CHUNK_NUMEL = 1 << 18
"""Elements summed at a time: the intermediate sums of a chunk stay in the second-level cache."""


def sum_tree(parts: Sequence[Tensor], out: Tensor, scale: float = 1.0) -> None:
    """Computes `out[i] = scale * (sum over p of parts[p][i])` in the dtype of `out`, in the order of a fixed binary
    tree over p.

    `out` may be one of `parts`. All are 1-D and have the same length.
    """
    if len(parts) == 1:
        torch.mul(parts[0], scale, out=out) if scale != 1.0 else out.copy_(parts[0])
        return
    for begin in range(0, out.numel(), SUM_CHUNK_NUMEL):
        chunk = [p[begin : begin + SUM_CHUNK_NUMEL] for p in parts]
        middle = _middle(len(parts))
        target = out[begin : begin + SUM_CHUNK_NUMEL]
        torch.add(_subtree(chunk[:middle], out.dtype), _subtree(chunk[middle:], out.dtype), out=target)
        if scale != 1.0:
            target.mul_(scale)  # while it is in the cache


def _middle(count: int) -> int:
    """Returns the index at which the tree splits: the largest power of two below `count`."""
    return 1 << ((count - 1).bit_length() - 1)


# Not a closure in `sum_tree`: a closure that calls itself is a reference cycle, which kept every received buffer alive
# until the garbage collector ran.
def _subtree(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    if len(parts) == 1:
        return parts[0].to(dtype)
    middle = _middle(len(parts))
    return torch.add(_subtree(parts[:middle], dtype), _subtree(parts[middle:], dtype))


def exchange(
    sends: Callable[[int], Sequence[Tensor]],
    receives: Callable[[int], Sequence[Tensor]],
    group: dist.ProcessGroup,
    tag: int,
    transport: Transport | None = None,
) -> list[Work]:
    """Starts to send the tensors `sends(p)` to every other rank p, and to receive `receives(p)` from it. Each rank
    starts with a different peer. Tensors that are sent must not change until the returned works have finished.
    """
    rank, size = group.rank(), group.size()
    works: list[Work] = []
    near = transport.exchange(tag) if transport is not None else None
    for step in range(1, size):
        to, origin = (rank + step) % size, (rank - step) % size
        # Slices may be empty; then no message is sent.
        incoming = [t for t in receives(origin) if t.numel()]
        outgoing = [t for t in sends(to) if t.numel()]
        if near is not None and near.reaches(origin):
            near.receive(origin, incoming)
        else:
            works += [group.recv([t], origin, tag) for t in incoming]
        if near is not None and near.reaches(to):
            near.send(to, outgoing)
        else:
            works += [group.send([t], to, tag) for t in outgoing]
    return [near, *works] if near is not None else works


class DirectAllGather:
    """An all-gather by [Note: direct exchange]. `input` should be this rank's slice of `output`; if it is other memory,
    it is copied there.
    """

    capabilities = Capabilities(tags=True)

    def __init__(self, number: int = 0, transport: Transport | None = None) -> None:
        self._tag, self._transport = GATHER_TAG + number, transport

    def bound(self, number: int, transport: Transport | None) -> DirectAllGather:
        """Returns an all-gather with message tag `number`. Ranks that gather with different numbers wait for each
        other, instead of receiving each other's messages.
        """
        return DirectAllGather(number, transport)

    def __call__(
        self, output: Tensor, input: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Work | None:
        slices = output.view(group.size(), -1)
        own = slices[group.rank()]
        if not same_place(own, input):
            own.copy_(input)
        works = exchange(lambda _: [own], lambda p: [slices[p]], group, self._tag, self._transport)
        work = Then(works, _nothing)
        if async_op:
            return work
        work.wait()
        return None


class OrderedReduceScatter:
    """A reduce-scatter in the order of [Note: ordered reduction], by [Note: direct exchange]."""

    capabilities = Capabilities(tags=True, pieces=True)

    def __init__(self, transport: Transport | None = None) -> None:
        self._transport = transport

    def bound(self, number: int, transport: Transport | None) -> OrderedReduceScatter:
        """Returns a reduce-scatter that uses `transport`; `number` has no effect."""
        return OrderedReduceScatter(transport)

    def __call__(
        self,
        output: Tensor,
        input: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> Work | None:
        parts = list(input.view(group.size(), -1))
        work = _ordered(output, parts, group, op, REDUCE_TAG, self._transport)
        if async_op:
            return work
        work.wait()
        return None


def _ordered(
    out: Tensor,
    parts: Sequence[Tensor],
    group: dist.ProcessGroup,
    op: dist.ReduceOp.RedOpType,
    tag: int,
    transport: Transport | None = None,
) -> Work:
    """Starts to send `parts[p]` to each rank p, and to sum the received parts, [Note: ordered reduction]."""
    rank, size = group.rank(), group.size()
    received = in_large_pages(parts[rank].new_empty(size - 1, parts[rank].numel()))
    mine = [parts[p] if p == rank else received[p - (p > rank)] for p in range(size)]
    works = exchange(lambda p: [parts[p]], lambda p: [mine[p]], group, tag, transport)
    scale = 1.0 / size if op == dist.ReduceOp.AVG else 1.0

    def add_up() -> None:
        sum_tree(mine, out, scale)
        mine.clear()  # frees the messages, even if the caller keeps the finished work

    return Then(works, add_up)


def gather_uneven(whole: Tensor, sizes: Sequence[int], ranks: Ranks, tag: int) -> Work:
    """Like `Comm.gather` with slices of `sizes` elements: by direct exchange on the CPU, by the backend elsewhere."""
    assert ranks.group is not None
    parts = list(torch.split(whole, list(sizes)))
    own = parts[ranks.rank]
    if whole.device.type == "cpu":
        works = exchange(lambda _: [own], lambda p: [parts[p]], ranks.group, tag, ranks.transport)
        return Then(works, _nothing)
    return dist.all_gather(parts, own, group=ranks.group, async_op=True) or Done()


def reduce_uneven(
    out: Tensor, whole: Tensor, sizes: Sequence[int], ranks: Ranks, op: dist.ReduceOp.RedOpType, tag: int
) -> Work:
    """Like `Comm.reduce` with slices of `sizes` elements."""
    assert ranks.group is not None
    parts = list(torch.split(whole, list(sizes)))
    if whole.device.type == "cpu":
        return _ordered(out, parts, ranks.group, op, tag, ranks.transport)
    result = out if out.dtype == whole.dtype else torch.empty_like(out, dtype=whole.dtype)
    work: Work | None = dist.reduce_scatter(result, parts, op=op, group=ranks.group, async_op=True)
    return Then([work] if work is not None else [], lambda: _widen(result, out))


def _widen(result: Tensor, out: Tensor) -> None:
    if result is not out:
        out.copy_(result)


def _nothing() -> None:
    return None
