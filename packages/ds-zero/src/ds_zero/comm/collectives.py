"""The collectives that ds_zero uses, behind FSDP2's `Comm` signature.

[Note: ordered reduction]
A ring or tree inside a library adds in an order that depends on the number of ranks and on the message size.
Here every rank sends slice r to rank r, and rank r adds what it received in the order of a fixed binary tree
over rank indices, in fp32. The bytes on the wire are those of a ring reduce-scatter, (N-1)/N of the buffer,
and the result depends on nothing but the inputs.

[Note: direct exchange]
On gloo, `all_gather_into_tensor` and `reduce_scatter_tensor` move each byte several times: for 32 MB of fp32
on 2 ranks they took 2.8 and 9 times as long as sending each slice straight to the rank that needs it.
Messages carry a tag of their own for gathering and for reducing, so the two never wait for each other's
order. Between processes of one machine that can read each other's memory nothing travels at all:
[Note: peer memory] in `comm/peer_memory.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ds_zero.comm.peer_memory import Exchange, PeerMemory
from ds_zero.comm.ranks import Ranks
from ds_zero.interfaces import AllGather, Capabilities, ReduceScatter, Work, capabilities_of
from ds_zero.tensors.large_pages import in_large_pages
from ds_zero.tensors.storage import same_place

REDUCE_TAG, GATHER_TAG = 0x6A, 0x1000
MOST_RANKS_OF_PIECES = 8
"""Ranks up to which gradients travel in pieces: with more of them, pieces are small and messages many."""
SUM_CHUNK_NUMEL = 1 << 18
"""Elements summed at a time: the intermediate sums of a chunk stay in the second-level cache."""


class Done:
    """A work that is already finished."""

    def wait(self) -> None:
        return None


def wait_received(work: Work) -> None:
    """Wait until what comes is there. `wait_sent` must follow before what was sent may change or go."""
    getattr(work, "wait_received", work.wait)()


def wait_sent(work: Work) -> None:
    """After `wait_received`: wait until nobody needs what was sent any more.

    [Note: received and sent]
    A rank that reads peer memory copies when it needs the values, so what was sent has to stay until the slowest rank
    has come as far as this one. A rank that waits for that at once moves in step with all others, and the delays of all
    ranks add up. So the two waits are apart: the second comes one bucket or one unit later, when it is usually over.
    """
    late = getattr(work, "wait_sent", None)
    if late is not None:
        late()


class Then:
    """Several works, and what has to happen once after what comes has come."""

    def __init__(self, works: Sequence[Work], then: Callable[[], None]) -> None:
        self._works, self._then, self._arrived = list(works), then, False

    def wait_received(self) -> None:
        if self._arrived:
            return
        for work in self._works:
            wait_received(work)
        self._arrived = True
        self._then()

    def wait_sent(self) -> None:
        works, self._works = self._works, []
        for work in works:
            wait_sent(work)

    def wait(self) -> None:
        self.wait_received()
        self.wait_sent()


def _nothing() -> None:
    return None


def sum_tree(parts: Sequence[Tensor], out: Tensor, scale: float = 1.0) -> None:
    """`out[i] = scale * (sum over parts of parts[p][i])` in the order of a fixed binary tree over p, in `out`'s
    dtype.

    `out` may be one of `parts`. All are 1-D and of equal length.
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
    """The largest power of two below `count`: where the tree splits."""
    return 1 << ((count - 1).bit_length() - 1)


# A function of its own, not a closure: a closure that calls itself is a reference cycle, which kept every
# received buffer alive until the garbage collector came by.
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
    peer_memory: PeerMemory | None = None,
) -> list[Work]:
    """Send all of `sends(p)` to and receive all of `receives(p)` from every other rank p; all ranks start with a
    different peer. What is sent must not change before the works are over.
    """
    rank, size = group.rank(), group.size()
    works: list[Work] = []
    near = Exchange(peer_memory, tag) if peer_memory is not None else None
    for step in range(1, size):
        to, origin = (rank + step) % size, (rank - step) % size
        # Slices may be empty, and then nobody sends them.
        coming = [t for t in receives(origin) if t.numel()]
        going = [t for t in sends(to) if t.numel()]
        if near is not None and near.reaches(origin):
            near.receive(origin, coming)
        else:
            works += [group.recv([t], origin, tag) for t in coming]
        if near is not None and near.reaches(to):
            near.send(to, going)
        else:
            works += [group.send([t], to, tag) for t in going]
    return [near, *works] if near is not None else works


class DirectAllGather:
    """[Note: direct exchange]; `input` should be the rank's own slice of `output`, else it is copied
    there.
    """

    capabilities = Capabilities(tags=True)

    def __init__(self, number: int = 0, peer_memory: PeerMemory | None = None) -> None:
        self._tag, self._peer_memory = GATHER_TAG + number, peer_memory

    def bound(self, number: int, peer_memory: PeerMemory | None) -> DirectAllGather:
        """One whose messages meet only those of the same number: ranks that gather different things wait for
        each other, and never take one for the other.
        """
        return DirectAllGather(number, peer_memory)

    def __call__(
        self, output: Tensor, input: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Work | None:
        slices = output.view(group.size(), -1)
        own = slices[group.rank()]
        if not same_place(own, input):
            own.copy_(input)
        works = exchange(lambda _: [own], lambda p: [slices[p]], group, self._tag, self._peer_memory)
        work = Then(works, _nothing)
        if async_op:
            return work
        work.wait()
        return None


class OrderedReduceScatter:
    """[Note: ordered reduction] over [Note: direct exchange]."""

    capabilities = Capabilities(tags=True, pieces=True)

    def __init__(self, peer_memory: PeerMemory | None = None) -> None:
        self._peer_memory = peer_memory

    def bound(self, number: int, peer_memory: PeerMemory | None) -> OrderedReduceScatter:
        """The same, over the memory of the peers that can be read."""
        return OrderedReduceScatter(peer_memory)

    def __call__(
        self,
        output: Tensor,
        input: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> Work | None:
        parts = list(input.view(group.size(), -1))
        work = _ordered(output, parts, group, op, REDUCE_TAG, self._peer_memory)
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
    peer_memory: PeerMemory | None = None,
) -> Work:
    """Send `parts[p]` to rank p and sum what arrives, [Note: ordered reduction]."""
    rank, size = group.rank(), group.size()
    received = in_large_pages(parts[rank].new_empty(size - 1, parts[rank].numel()))
    mine = [parts[p] if p == rank else received[p - (p > rank)] for p in range(size)]
    works = exchange(lambda p: [parts[p]], lambda p: [mine[p]], group, tag, peer_memory)
    scale = 1.0 / size if op == dist.ReduceOp.AVG else 1.0

    def add_up() -> None:
        sum_tree(mine, out, scale)
        mine.clear()  # a finished work may be kept; its messages need not be

    return Then(works, add_up)


# torch 2.13 renamed the two collectives and warns about the old names; 2.11 has only those.
_gather_collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class TorchAllGather:
    """The backend's own collective."""

    def __call__(
        self, output: Tensor, input: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Work | None:
        work: Work | None = _gather_collective(output, input, group=group, async_op=async_op)
        return work


class TorchReduceScatter:
    """The backend's own collective; it sums in `input`'s dtype, in an order of its own."""

    def __call__(
        self,
        output: Tensor,
        input: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> Work | None:
        same = output.dtype == input.dtype
        result = output if same else torch.empty_like(output, dtype=input.dtype)
        work: Work | None = _reduce_collective(result, input, op=op, group=group, async_op=async_op)
        if same:
            return work

        def widen() -> None:
            output.copy_(result)

        then = Then([work] if work is not None else [], widen)
        if async_op:
            return then
        then.wait()
        return None


class _Gathers(Protocol):
    """What the capability `tags` of an `AllGather` promises."""

    def bound(self, number: int, peer_memory: PeerMemory | None) -> AllGather: ...


class _Reduces(Protocol):
    """The same of a `ReduceScatter`."""

    def bound(self, number: int, peer_memory: PeerMemory | None) -> ReduceScatter: ...


class Pieces(Protocol):
    """`ds_zero.comm.piece_exchange.PieceReduce`, which is built on this module."""

    sent_numel: int

    def start(self, out: Tensor, grads: Sequence[Tensor], mean: bool) -> Work: ...


class Comm:
    """All-gather and reduce-scatter for one model, with counts of the bytes sent."""

    def __init__(self, all_gather: AllGather, reduce_scatter: ReduceScatter) -> None:
        self.all_gather, self.reduce_scatter = all_gather, reduce_scatter
        self.gathered_bytes = 0
        """Bytes that this rank has sent in gathers since this object was made."""
        self.reduced_bytes = 0
        """Bytes that this rank has sent in reductions."""

    def guard(self, what: str) -> AbstractContextManager[None]:
        """A context around a collective that is not started by this object; `what` names it in error messages."""
        return nullcontext()

    def gather(
        self, whole: Tensor, ranks: Ranks, *, sizes: Sequence[int] | None = None, number: int = 0
    ) -> Work:
        """Start to fill `whole` (1-D) with the slices of all ranks; it contains this rank's slice already.

        Args:
            sizes: number of elements of each rank's slice, if they differ.
            number: message tag; gathers with different numbers do not receive each other's messages.
        """
        if ranks.group is None:
            return Done()
        own = whole[slice(*_range(whole.numel(), ranks, sizes))]
        self.gathered_bytes += (ranks.size - 1) * own.numel() * own.element_size()
        if sizes is not None:
            return gather_uneven(whole, sizes, ranks, GATHER_TAG + number)
        collective = self.all_gather
        if capabilities_of(collective).tags:
            collective = cast("_Gathers", collective).bound(number, ranks.peer_memory)
        return collective(whole, own, ranks.group, async_op=True) or Done()

    def reduce(
        self,
        out: Tensor,
        whole: Tensor,
        ranks: Ranks,
        op: dist.ReduceOp.RedOpType,
        *,
        sizes: Sequence[int] | None = None,
    ) -> Work:
        """Start to sum (or average) `whole` over the ranks; `out` receives this rank's slice of the result."""
        if ranks.group is None:
            out.copy_(whole)
            return Done()
        self.reduced_bytes += (whole.numel() - out.numel()) * whole.element_size()
        if sizes is not None:
            return reduce_uneven(out, whole, sizes, ranks, op, REDUCE_TAG)
        collective = self.reduce_scatter
        if capabilities_of(collective).tags:
            collective = cast("_Reduces", collective).bound(0, ranks.peer_memory)
        return collective(out, whole, ranks.group, op, async_op=True) or Done()

    def takes_pieces(self, ranks: Ranks, device: torch.device) -> bool:
        """Whether to call `reduce_pieces` instead of `reduce`: if ranks send directly to each other, and are so few
        that each one's part of a gradient is large enough for a message of its own.
        """
        if ranks.group is None:
            return True
        direct = capabilities_of(self.reduce_scatter).pieces and device.type == "cpu"
        return direct and ranks.size <= MOST_RANKS_OF_PIECES

    def reduce_pieces(
        self, out: Tensor, grads: Sequence[Tensor], pieces: Pieces, op: dist.ReduceOp.RedOpType
    ) -> Work:
        """Like `reduce`, but the gradients are separate tensors: a flat one for each slot of the bucket."""
        self.reduced_bytes += pieces.sent_numel * grads[0].element_size()
        return pieces.start(out, grads, op == dist.ReduceOp.AVG)

    def all_reduce(self, whole: Tensor, ranks: Ranks, op: dist.ReduceOp.RedOpType) -> None:
        """Replace `whole` by the sum over ranks: every rank reduces a slice, then slices are gathered, as in a
        ring. The order of additions is that of `reduce`.
        """
        if ranks.group is None:
            return
        even = whole.numel() % ranks.size == 0
        sizes = None if even else [len(part) for part in torch.tensor_split(whole, ranks.size)]
        begin, end = _range(whole.numel(), ranks, sizes)
        reduced = torch.empty_like(whole[begin:end])
        self.reduce(reduced, whole, ranks, op, sizes=sizes).wait()
        whole[begin:end].copy_(reduced)
        self.gather(whole, ranks, sizes=sizes).wait()

    def gather_slices(
        self, own: Tensor, ranks: Ranks, device: torch.device, sizes: Sequence[int] | None = None
    ) -> Tensor:
        """All ranks' slices side by side in a new tensor on `device`; `own` is this rank's."""
        numel = ranks.size * own.numel() if sizes is None else sum(sizes)
        whole = torch.empty(numel, dtype=own.dtype, device=device)
        whole[slice(*_range(numel, ranks, sizes))].copy_(own)
        self.gather(whole, ranks, sizes=sizes).wait()
        return whole


def _range(numel: int, ranks: Ranks, sizes: Sequence[int] | None) -> tuple[int, int]:
    """Where this rank's slice of `numel` elements lies."""
    if sizes is None:
        each = numel // ranks.size
        return ranks.rank * each, (ranks.rank + 1) * each
    begin = sum(sizes[: ranks.rank])
    return begin, begin + sizes[ranks.rank]


def gather_uneven(whole: Tensor, sizes: Sequence[int], ranks: Ranks, tag: int) -> Work:
    """As `Comm.gather` with slices of `sizes` elements: straight from rank to rank on the CPU, by the backend
    elsewhere.
    """
    assert ranks.group is not None
    parts = list(torch.split(whole, list(sizes)))
    own = parts[ranks.rank]
    if whole.device.type == "cpu":
        works = exchange(lambda _: [own], lambda p: [parts[p]], ranks.group, tag, ranks.peer_memory)
        return Then(works, _nothing)
    return dist.all_gather(parts, own, group=ranks.group, async_op=True) or Done()


def reduce_uneven(
    out: Tensor, whole: Tensor, sizes: Sequence[int], ranks: Ranks, op: dist.ReduceOp.RedOpType, tag: int
) -> Work:
    """As `Comm.reduce` with slices of `sizes` elements."""
    assert ranks.group is not None
    parts = list(torch.split(whole, list(sizes)))
    if whole.device.type == "cpu":
        return _ordered(out, parts, ranks.group, op, tag, ranks.peer_memory)
    result = out if out.dtype == whole.dtype else torch.empty_like(out, dtype=whole.dtype)
    work: Work | None = dist.reduce_scatter(result, parts, op=op, group=ranks.group, async_op=True)
    return Then([work] if work is not None else [], lambda: _widen(result, out))


def _widen(result: Tensor, out: Tensor) -> None:
    if result is not out:
        out.copy_(result)


def default_comm(device: torch.device, *, ordered: bool | None = None) -> Comm:
    """Direct and ordered on the CPU, the backend's collectives elsewhere; `ordered` decides itself where it is
    given.
    """
    if ordered if ordered is not None else device.type == "cpu":
        return Comm(DirectAllGather(), OrderedReduceScatter())
    return Comm(TorchAllGather(), TorchReduceScatter())
