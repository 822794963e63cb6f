"""Reduces one bucket: from each rank's gradients of the whole bucket to its slice of the mean over ranks.

[Note: predivided mean]
With predivide factor f and n ranks, gradients are multiplied by 1/f before the reduction, and their sum by f/n after
it. In a 16-bit dtype a large f avoids overflow in the sum (with f = n it is a mean), and a small f keeps small
gradients (with f = 1 they are not changed before the sum). If f and n are powers of two, the result has the same bits
for every f.

[Note: replicas]
On a mesh with a replicate axis, several groups of ranks hold the same slices. A bucket is first reduce-scattered within
each group. Then each rank all-reduces its slice with the ranks of other groups that hold the same slice. So only
1/(size of a group) of the bucket is sent between groups.
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
    """The options of `ZeroConfig` for the messages of reductions."""

    scatter: bool = True
    """Whether to reduce-scatter, so that each rank receives only its slice; else all-reduce."""
    dtype: torch.dtype | None = None
    """Dtype in which gradients are sent; None: the dtype in which they were accumulated."""
    mean: bool = True
    """Whether sums are divided by the number of ranks."""
    predivide: float = 1.0
    """The factor f of [Note: predivided mean]."""


class BucketReduction:
    """The reduction of one bucket, in progress."""

    def __init__(
        self,
        bucket: Bucket,
        work: Work,
        sent: Tensor | Sequence[Tensor],
        received: Tensor,
        factor: float,
        comm: Comm,
    ) -> None:
        """
        Args:
            sent: this rank's gradients, which are kept alive until no other rank needs them.
            received: fp32 memory that `work` fills.
            factor: what the result of `work` is multiplied by.
        """
        self.bucket = bucket
        self._work, self._sent, self._received = work, sent, received
        self._factor, self._comm = factor, comm

    def wait(self) -> None:
        """Waits for the messages of a reduction whose result is not needed."""
        self._work.wait()

    def result(self) -> Tensor:
        """Waits for the messages, and returns this rank's slice of the result, in fp32. Call `wait_sent` later."""
        wait_received(self._work)
        if self.bucket.device.type != "cpu":
            self._sent = ()  # only on the CPU do other ranks read this rank's memory
        bucket, result = self.bucket, self._received
        if result.numel() == bucket.layout.padded_numel and bucket.ranks.size > 1:
            result = bucket.slice_of(result).clone()
        if bucket.ranks.replicas is not None:
            self._comm.all_reduce(result, bucket.ranks.replicas, dist.ReduceOp.SUM)
        if self._factor != 1.0:
            result.mul_(self._factor)
        return result

    def wait_sent(self) -> None:
        """Waits until no other rank needs this rank's gradients, and frees them, [Note: received and sent]."""
        wait_sent(self._work)
        self._sent = ()


def takes_pieces(bucket: Bucket, comm: Comm, policy: WirePolicy) -> bool:
    """Whether the bucket's gradients can be reduced from the memory in which autograd stored them, [Note: reduction
    without copying].
    """
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
    out: Tensor | None,
) -> BucketReduction:
    """Like `launch`, with one flat gradient per slot. Only for buckets for which `takes_pieces` is true."""
    op, factor = operation(bucket.ranks, policy)
    received = _output(bucket, out)
    work = comm.reduce_pieces(received, grads, pieces, op)
    return BucketReduction(bucket, work, grads, received, factor, comm)


def _output(bucket: Bucket, out: Tensor | None) -> Tensor:
    """Returns `out`, or new memory for this rank's slice of a result."""
    begin, end = bucket.slice_range
    return out if out is not None else torch.empty(end - begin, dtype=torch.float32, device=bucket.device)


def operation(ranks: Ranks, policy: WirePolicy) -> tuple[dist.ReduceOp.RedOpType, float]:
    """Returns the operation of the collective, and the factor for its result: the collective's own mean if that is the
    wanted one, else its sum and a factor.
    """
    if policy.mean and policy.predivide == 1.0 and ranks.divisor == ranks.size:
        return dist.ReduceOp.AVG, 1.0
    return dist.ReduceOp.SUM, policy.predivide / (ranks.divisor if policy.mean else 1)


def launch(
    bucket: Bucket,
    source: Tensor,
    comm: Comm,
    policy: WirePolicy,
    out: Tensor | None = None,
    *,
    used: bool = True,
) -> BucketReduction:
    """Starts to reduce `source`, this rank's gradients of the whole bucket, which must not be used afterwards.
    Collective: all ranks launch the same buckets in the same order.

    Args:
        out: fp32 memory for this rank's slice of the result; None allocates it.
        used: whether a step will use the result.
    """
    ranks = bucket.ranks
    if policy.predivide != 1.0:
        source.mul_(1.0 / policy.predivide)
    sent = source if policy.dtype is None else source.to(policy.dtype)
    op, factor = operation(ranks, policy)
    if ranks.group is None:
        received = sent.float() if out is None else out.copy_(sent)
        return BucketReduction(bucket, Done(), sent, received, factor, comm)
    if policy.scatter or bucket.layout.num_owners == 1:
        received = _output(bucket, out)
        name = bucket.layout.name if used else None
        work = comm.reduce(received, sent, ranks, op, sizes=bucket.layout.slice_sizes, bucket=name)
    else:
        received = sent.float()
        comm.all_reduce(received, ranks, op)
        work = Done()
    return BucketReduction(bucket, work, sent, received, factor, comm)
