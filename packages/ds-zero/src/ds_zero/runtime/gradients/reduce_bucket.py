"""How gradients travel: from one rank's whole bucket to its slice of the mean over ranks.

[Note: mean in parts]
With predivide factor f and n ranks, gradients are multiplied by 1/f before they travel and sums by f/n after:
narrow types neither overflow in the sum (f = n) nor lose small values before it (f = 1). Powers of two change
no bit of it.

[Note: replicas]
Where groups of ranks hold the same slices, a bucket is first reduced inside the group; then each rank
all-reduces its slice with those that hold the same one. Only 1/size of the bucket crosses between groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ds_zero.comm.collectives import Comm
from ds_zero.comm.piece_exchange import PieceReduce
from ds_zero.comm.ranks import Ranks
from ds_zero.comm.works import Done, wait_received, wait_sent
from ds_zero.interfaces import Work
from ds_zero.runtime.bucket import Bucket


@dataclass(frozen=True, kw_only=True)
class WirePolicy:
    """What `ZeroConfig` says about reductions."""

    scatter: bool = True
    """Whether each rank receives its slice alone; else everybody receives everything and keeps a slice."""
    dtype: torch.dtype | None = None
    """What travels; None: what was accumulated."""
    mean: bool = True
    """Whether sums are divided by the number of ranks."""
    predivide: float = 1.0
    """[Note: mean in parts]"""


class Flight:
    """One bucket on its way."""

    def __init__(
        self,
        bucket: Bucket,
        work: Work,
        travels: Tensor | Sequence[Tensor],
        arrives: Tensor,
        factor: float,
        comm: Comm,
    ) -> None:
        """`travels` is held until the flight has settled."""
        self.bucket = bucket
        self._work, self._travels, self._arrives = work, travels, arrives
        self._factor, self._comm = factor, comm

    def wait(self) -> None:
        """Return when the messages have come; the result is not wanted."""
        self._work.wait()

    def land(self) -> Tensor:
        """This rank's slice of the result, fp32. `wait_sent` must follow."""
        wait_received(self._work)
        if self.bucket.device.type != "cpu":
            self._travels = ()  # nobody copies it from there
        bucket, result = self.bucket, self._arrives
        if result.numel() == bucket.layout.padded_numel and bucket.ranks.size > 1:
            result = bucket.slice_of(result).clone()
        if bucket.ranks.replicas is not None:
            self._comm.all_reduce(result, bucket.ranks.replicas, dist.ReduceOp.SUM)
        if self._factor != 1.0:
            result.mul_(self._factor)
        return result

    def wait_sent(self) -> None:
        """Return when nobody needs this rank's gradients any more, [Note: received and sent]."""
        wait_sent(self._work)
        self._travels = ()


def takes_pieces(bucket: Bucket, comm: Comm, policy: WirePolicy) -> bool:
    """Whether the bucket's gradients may stay where autograd puts them until they travel."""
    narrowed = policy.dtype not in (None, bucket.dtype)
    scattered = policy.scatter or bucket.layout.num_owners == 1
    return (
        scattered
        and not narrowed
        and not bucket.layout.by_rows
        and policy.predivide == 1.0
        and comm.takes_pieces(bucket.ranks, bucket.device, bucket.dtype)
    )


def launch_pieces(
    bucket: Bucket,
    grads: Sequence[Tensor],
    pieces: PieceReduce,
    comm: Comm,
    policy: WirePolicy,
    place: Tensor | None,
) -> Flight:
    """As `launch`, of one flat gradient for each slot; `takes_pieces` says where it may be used."""
    op, factor = operation(bucket.ranks, policy)
    arrives = _landing(bucket, place)
    work = comm.reduce_pieces(arrives, grads, pieces, op)
    return Flight(bucket, work, grads, arrives, factor, comm)


def _landing(bucket: Bucket, place: Tensor | None) -> Tensor:
    """`place`, or new memory for this rank's slice of a result."""
    begin, end = bucket.slice_range
    return place if place is not None else torch.empty(end - begin, dtype=torch.float32, device=bucket.device)


def operation(ranks: Ranks, policy: WirePolicy) -> tuple[dist.ReduceOp.RedOpType, float]:
    """What the backend does with the ranks' values, and what its result is multiplied by: its own mean where it is
    the one that is wanted.
    """
    if policy.mean and policy.predivide == 1.0 and ranks.divisor == ranks.size:
        return dist.ReduceOp.AVG, 1.0
    return dist.ReduceOp.SUM, policy.predivide / (ranks.divisor if policy.mean else 1)


def launch(
    bucket: Bucket, source: Tensor, comm: Comm, policy: WirePolicy, place: Tensor | None = None
) -> Flight:
    """Start to reduce `source`, this rank's gradients of a whole bucket, which must not be used afterwards.
    Collective; all ranks launch the same buckets in the same order.

    Args:
        place: where this rank's slice of the result may be put when it lands, fp32; else it gets memory of its own.
    """
    ranks = bucket.ranks
    if policy.predivide != 1.0:
        source.mul_(1.0 / policy.predivide)
    travels = source if policy.dtype is None else source.to(policy.dtype)
    op, factor = operation(ranks, policy)
    if ranks.group is None:
        return Flight(bucket, Done(), travels, travels.float(), factor, comm)
    if policy.scatter or bucket.layout.num_owners == 1:
        arrives = _landing(bucket, place)
        work = comm.reduce(arrives, travels, ranks, op, sizes=bucket.layout.slice_sizes)
    else:
        arrives = travels.float()
        comm.all_reduce(arrives, ranks, op)
        work = Done()
    return Flight(bucket, work, travels, arrives, factor, comm)
