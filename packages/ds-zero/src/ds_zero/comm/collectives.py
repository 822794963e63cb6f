"""The collectives of ds_zero, with the call signatures of FSDP2's `Comm`, and the choice between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ds_zero.comm.direct import (
    GATHER_TAG,
    REDUCE_TAG,
    DirectAllGather,
    OrderedReduceScatter,
    gather_uneven,
    reduce_uneven,
)
from ds_zero.comm.ranks import AXES, Ranks
from ds_zero.comm.works import Done, Then
from ds_zero.interfaces import (
    AllGather,
    CollectivePair,
    CollectiveSet,
    Connect,
    CountsBytes,
    FrozenParams,
    ReducesBuckets,
    ReduceScatter,
    Transport,
    Work,
    capabilities_of,
)

MOST_RANKS_OF_PIECES = 8
"""Maximum number of ranks for [Note: reduction without copying]: with more, messages are many and small."""


# torch 2.13 renamed the two collectives and warns about the old names; 2.11 has only those.
_gather_collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class TorchAllGather:
    """The collective of the backend."""

    def __call__(
        self, output: Tensor, input: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Work | None:
        work: Work | None = _gather_collective(output, input, group=group, async_op=async_op)
        return work


class TorchReduceScatter:
    """The collective of the backend, which sums in the dtype of `input` and in its own order."""

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

    def bound(self, number: int, transport: Transport | None) -> AllGather: ...


class _Reduces(Protocol):
    """What the capability `tags` of a `ReduceScatter` promises."""

    def bound(self, number: int, transport: Transport | None) -> ReduceScatter: ...


class _GathersUneven(Protocol):
    """What the capability `uneven` of an `AllGather` promises."""

    def __call__(
        self,
        output: Tensor,
        input: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
        *,
        sizes: Sequence[int],
    ) -> Work | None: ...


class _ReducesUneven(Protocol):
    """What the capability `uneven` of a `ReduceScatter` promises."""

    def __call__(
        self,
        output: Tensor,
        input: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
        *,
        sizes: Sequence[int],
    ) -> Work | None: ...


class Pieces(Protocol):
    """`ds_zero.comm.piece_exchange.PieceReduce`, which is built on this module."""

    sent_numel: int
    num_ranks: int

    def start(self, out: Tensor, grads: Sequence[Tensor], mean: bool) -> Work: ...


@dataclass(frozen=True)
class Collectives:
    """An all-gather and a reduce-scatter for one kind of ranks."""

    all_gather: AllGather
    reduce_scatter: ReduceScatter


class Comm:
    """All-gather and reduce-scatter for one model; counts the bytes that are sent."""

    def __init__(
        self,
        all_gather: AllGather,
        reduce_scatter: ReduceScatter,
        *,
        axes: Mapping[str, Collectives] | None = None,
        connect: Connect | None = None,
        frozen: FrozenParams | None = None,
    ) -> None:
        """
        Args:
            connect: finds ranks with which tensors are exchanged without messages. Default: all ranks send messages.
            axes: other collectives for some kinds of ranks, by their name in `ds_zero.comm.ranks.AXES`, such as
                "replicate" for the rows of a mesh of two axes, which often lie on different machines.
            frozen: stores and gathers frozen parameters at stage 3. Default: they are treated as the others.

        Raises:
            ValueError: an unknown axis.
        """
        unknown = sorted(set(axes or ()) - set(AXES))
        if unknown:
            raise ValueError(f"Comm(axes=...): there is no axis {unknown[0]!r}; there are {', '.join(AXES)}")
        self.all_gather, self.reduce_scatter = all_gather, reduce_scatter
        self.axes = dict(axes or {})
        self.connect = connect
        self.frozen = frozen
        self.gathered_bytes = 0
        """Bytes that this rank has sent in all-gathers since this object was constructed."""
        self.reduced_bytes = 0
        """Bytes that this rank has sent in reductions since this object was constructed."""

    @property
    def description(self) -> str:
        """The classes of the collectives and the transport, which must be the same on every rank."""
        pairs = {"": Collectives(self.all_gather, self.reduce_scatter), **self.axes}
        named = [
            f"{axis + ': ' if axis else ''}{type(p.all_gather).__qualname__}, {type(p.reduce_scatter).__qualname__}"
            for axis, p in pairs.items()
        ]
        transport = getattr(self.connect, "__qualname__", type(self.connect).__qualname__)
        return "; ".join([*named, f"connect: {transport}", f"frozen: {type(self.frozen).__qualname__}"])

    def guard(self, what: str) -> AbstractContextManager[None]:
        """Context manager around a collective that this object does not start; `what` names it in error messages."""
        return nullcontext()

    def gather(
        self,
        whole: Tensor,
        ranks: Ranks,
        *,
        sizes: Sequence[int] | None = None,
        number: int = 0,
        frozen: bool = False,
    ) -> Work:
        """Starts to fill `whole` (1-D) with the slices of all ranks. `whole` must already contain this rank's slice.

        Args:
            sizes: number of elements of each rank's slice, if they differ.
            number: message tag; gathers with different numbers do not receive each other's messages.
            frozen: whether they are stored frozen parameters.
        """
        if ranks.group is None:
            return Done()
        own = whole[slice(*_range(whole.numel(), ranks, sizes))]
        collective = self._of(ranks).all_gather
        if frozen and self.frozen is not None:
            collective = self.frozen.all_gather
        if not capabilities_of(collective).moves(whole.dtype):
            collective = _defaults(whole.device).all_gather
        self.gathered_bytes += (
            collective.sent_bytes(whole.numel(), whole.dtype, ranks.size)
            if isinstance(collective, CountsBytes)
            else (ranks.size - 1) * own.numel() * own.element_size()
        )
        can = capabilities_of(collective)
        if sizes is not None and not can.uneven:
            return gather_uneven(whole, sizes, ranks, GATHER_TAG + number)
        if can.tags:
            collective = cast("_Gathers", collective).bound(number, ranks.transport)
        if sizes is not None:
            uneven = cast("_GathersUneven", collective)
            return uneven(whole, own, ranks.group, async_op=True, sizes=sizes) or Done()
        return collective(whole, own, ranks.group, async_op=True) or Done()

    def reduce(
        self,
        out: Tensor,
        whole: Tensor,
        ranks: Ranks,
        op: dist.ReduceOp.RedOpType,
        *,
        sizes: Sequence[int] | None = None,
        bucket: str | None = None,
    ) -> Work:
        """Starts to sum (or average) `whole` over the ranks. `out` receives this rank's slice of the result.

        Args:
            bucket: name of the bucket whose gradients `whole` has, for collectives that keep something of them; None:
                they are not gradients, or no step uses the result.
        """
        if ranks.group is None:
            out.copy_(whole)
            return Done()
        collective = self._of(ranks).reduce_scatter
        if not capabilities_of(collective).moves(whole.dtype):
            collective = _defaults(whole.device).reduce_scatter
        self.reduced_bytes += (
            collective.sent_bytes(whole.numel(), whole.dtype, ranks.size)
            if isinstance(collective, CountsBytes)
            else (whole.numel() - out.numel()) * whole.element_size()
        )
        can = capabilities_of(collective)
        if sizes is not None and not can.uneven:
            return reduce_uneven(out, whole, sizes, ranks, op, REDUCE_TAG)
        if isinstance(collective, ReducesBuckets):
            collective = collective.for_bucket(bucket)
        if can.tags:
            collective = cast("_Reduces", collective).bound(0, ranks.transport)
        if sizes is not None:
            uneven = cast("_ReducesUneven", collective)
            return uneven(out, whole, ranks.group, op, async_op=True, sizes=sizes) or Done()
        return collective(out, whole, ranks.group, op, async_op=True) or Done()

    def takes_pieces(self, ranks: Ranks, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether to call `reduce_pieces` instead of `reduce`: if ranks send directly to each other, and there are at
        most `MOST_RANKS_OF_PIECES`.

        Args:
            dtype: dtype in which gradients are sent.
        """
        if ranks.group is None:
            return True
        can = capabilities_of(self._of(ranks).reduce_scatter)
        few = ranks.size <= MOST_RANKS_OF_PIECES
        return can.pieces and can.moves(dtype) and device.type == "cpu" and few

    def reduce_pieces(
        self, out: Tensor, grads: Sequence[Tensor], pieces: Pieces, op: dist.ReduceOp.RedOpType
    ) -> Work:
        """Like `reduce`, but the gradients are separate tensors: a flat one for each slot of the bucket."""
        self.reduced_bytes += pieces.sent_numel * grads[0].element_size()
        return pieces.start(out, grads, op == dist.ReduceOp.AVG)

    def _of(self, ranks: Ranks) -> Collectives:
        """Returns the collectives of the axis of `ranks`."""
        return self.axes.get(ranks.axis) or Collectives(self.all_gather, self.reduce_scatter)

    def all_reduce(self, whole: Tensor, ranks: Ranks, op: dist.ReduceOp.RedOpType) -> None:
        """Replaces `whole` by the sum over ranks: every rank reduces a slice, then the slices are gathered. The order
        of additions is that of `reduce`.
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
        """Returns a new tensor on `device` with the slices of all ranks, concatenated; `own` is this rank's slice."""
        numel = ranks.size * own.numel() if sizes is None else sum(sizes)
        whole = torch.empty(numel, dtype=own.dtype, device=device)
        whole[slice(*_range(numel, ranks, sizes))].copy_(own)
        self.gather(whole, ranks, sizes=sizes).wait()
        return whole


def _range(numel: int, ranks: Ranks, sizes: Sequence[int] | None) -> tuple[int, int]:
    """Returns the range of this rank's slice of `numel` elements."""
    if sizes is None:
        each = numel // ranks.size
        return ranks.rank * each, (ranks.rank + 1) * each
    begin = sum(sizes[: ranks.rank])
    return begin, begin + sizes[ranks.rank]


def comm_of(given: Comm | CollectiveSet | None, device: torch.device, *, ordered: bool | None = None) -> Comm:
    """Returns the collectives of a model. Those that `given` leaves out are the default ones of the device.

    Args:
        ordered: as for `default_comm`.
    """
    if given is None or isinstance(given, Comm):
        return given or default_comm(device, ordered=ordered)
    default = _defaults(device, ordered=ordered)

    def pair(one: CollectivePair) -> Collectives:
        return Collectives(one.all_gather or default.all_gather, one.reduce_scatter or default.reduce_scatter)

    own = pair(given)
    axes = {axis: pair(one) for axis, one in given.axes.items()}
    return Comm(own.all_gather, own.reduce_scatter, axes=axes, connect=given.connect, frozen=given.frozen)


def default_comm(device: torch.device, *, ordered: bool | None = None) -> Comm:
    """Returns the default collectives of a device.

    Args:
        ordered: whether to use [Note: direct exchange] and [Note: ordered reduction] instead of the backend's
            collectives. Default: on the CPU only.
    """
    chosen = _defaults(device, ordered=ordered)
    return Comm(chosen.all_gather, chosen.reduce_scatter)


def _defaults(device: torch.device, *, ordered: bool | None = None) -> Collectives:
    if ordered if ordered is not None else device.type == "cpu":
        return Collectives(DirectAllGather(), OrderedReduceScatter())
    return Collectives(TorchAllGather(), TorchReduceScatter())
