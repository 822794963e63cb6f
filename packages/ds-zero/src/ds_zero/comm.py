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
order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ds_zero.interfaces import AllGather, ReduceScatter, Work
from ds_zero.ranks import Ranks

REDUCE_TAG, GATHER_TAG = 0x6A, 0x1000
SUM_CHUNK_NUMEL = 1 << 18
"""Elements summed at a time: the intermediate sums of a chunk stay in the second-level cache."""


class Done:
    """A work that is already finished."""

    def wait(self) -> None:
        return None


class Then:
    """Several works, and what has to happen once after them."""

    def __init__(self, works: Sequence[Work], then: Callable[[], None]) -> None:
        self._works, self._then, self._finished = list(works), then, False

    def wait(self) -> None:
        if self._finished:
            return
        for work in self._works:
            work.wait()
        self._finished = True
        self._then()


def _nothing() -> None:
    return None


def sum_tree(parts: Sequence[Tensor], out: Tensor) -> None:
    """`out[i] = sum over parts of parts[p][i]` in the order of a fixed binary tree over p, in `out`'s dtype.

    `out` may be one of `parts`. All are 1-D and of equal length.
    """
    if len(parts) == 1:
        out.copy_(parts[0])
        return
    for begin in range(0, out.numel(), SUM_CHUNK_NUMEL):
        chunk = [p[begin : begin + SUM_CHUNK_NUMEL] for p in parts]
        middle = _middle(len(parts))
        target = out[begin : begin + SUM_CHUNK_NUMEL]
        torch.add(_subtree(chunk[:middle], out.dtype), _subtree(chunk[middle:], out.dtype), out=target)


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


def _allocate(size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(*size, dtype=dtype, device=device)


def _exchange(
    sends: Callable[[int], Tensor], receives: Callable[[int], Tensor], group: dist.ProcessGroup, tag: int
) -> list[Work]:
    """Send `sends(p)` to and receive `receives(p)` from every other rank p; all ranks start with a different
    peer.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    works: list[Work] = []
    for step in range(1, size):
        to, origin = (rank + step) % size, (rank - step) % size
        for work in (
            dist.irecv(receives(origin), group=group, group_src=origin, tag=tag),
            dist.isend(sends(to), group=group, group_dst=to, tag=tag),
        ):
            assert work is not None
            works.append(work)
    return works


class DirectAllGather:
    """[Note: direct exchange]; `input` should be the rank's own slice of `output`, else it is copied
    there.
    """

    def __init__(self, number: int = 0) -> None:
        self._tag = GATHER_TAG + number

    def numbered(self, number: int) -> DirectAllGather:
        """One whose messages meet only those of the same number: ranks that gather different things wait for
        each other, and never take one for the other.
        """
        return DirectAllGather(number)

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return _allocate(size, dtype=dtype, device=device)

    def __call__(
        self, output: Tensor, input: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Work | None:
        slices = output.view(dist.get_world_size(group), -1)
        own = slices[dist.get_rank(group)]
        if own.data_ptr() != input.data_ptr():
            own.copy_(input)
        work = Then(_exchange(lambda _: own, lambda p: slices[p], group, self._tag), _nothing)
        if async_op:
            return work
        work.wait()
        return None


class OrderedReduceScatter:
    """[Note: ordered reduction] over [Note: direct exchange]."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return _allocate(size, dtype=dtype, device=device)

    def __call__(
        self,
        output: Tensor,
        input: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> Work | None:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        slices = input.view(size, -1)
        received = torch.empty_like(slices)
        works = _exchange(lambda p: slices[p], lambda p: received[p], group, REDUCE_TAG)
        average = bool(op == dist.ReduceOp.AVG)
        parts = [slices[p] if p == rank else received[p] for p in range(size)]

        def add_up() -> None:
            sum_tree(parts, output)
            if average:
                output.mul_(1.0 / size)

        work = Then(works, add_up)
        if async_op:
            return work
        work.wait()
        return None


# torch 2.13 renamed the two collectives and warns about the old names; 2.11 has only those.
_gather_collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class TorchAllGather:
    """The backend's own collective."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return _allocate(size, dtype=dtype, device=device)

    def __call__(
        self, output: Tensor, input: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Work | None:
        work: Work | None = _gather_collective(output, input, group=group, async_op=async_op)
        return work


class TorchReduceScatter:
    """The backend's own collective; it sums in `input`'s dtype, in an order of its own."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return _allocate(size, dtype=dtype, device=device)

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


class Comm:
    """The pair of collectives of one model."""

    def __init__(self, all_gather: AllGather, reduce_scatter: ReduceScatter) -> None:
        self.all_gather, self.reduce_scatter = all_gather, reduce_scatter

    def gather_slices(self, own: Tensor, ranks: Ranks, device: torch.device) -> Tensor:
        """All ranks' slices side by side in a new tensor on `device`; `own` is this rank's."""
        assert ranks.group is not None
        whole = torch.empty(ranks.size, own.numel(), dtype=own.dtype, device=device)
        mine = whole[ranks.rank]
        mine.copy_(own)
        self.all_gather(whole.view(-1), mine, ranks.group)
        return whole.view(-1)


def default_comm(device: torch.device) -> Comm:
    """Direct and ordered on the CPU, the backend's collectives elsewhere."""
    if device.type == "cpu":
        return Comm(DirectAllGather(), OrderedReduceScatter())
    return Comm(TorchAllGather(), TorchReduceScatter())
