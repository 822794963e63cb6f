"""The reductions in progress, and the sums to which their results are added."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ds_zero.comm.collectives import Comm
from ds_zero.comm.piece_exchange import PieceReduce
from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.early_step import NoEarlySteps
from ds_zero.runtime.gradients.accumulate import Sums
from ds_zero.runtime.gradients.arrived_norms import ArrivedNorms
from ds_zero.runtime.gradients.grad_buffer import FreshGrads, GradBuffer
from ds_zero.runtime.gradients.reduce_bucket import BucketReduction, launch, launch_pieces, takes_pieces
from ds_zero.runtime.gradients.reduce_policy import ReducePolicy
from ds_zero.runtime.gradients.sparse_rows import launch_rows
from ds_zero.runtime.profiler_ranges import span


def whole_buffer(bucket: Bucket, dtype: torch.dtype) -> GradBuffer:
    """Allocates a buffer for the gradients of a whole bucket."""
    return GradBuffer(bucket.layout, dtype, bucket.device)


class Reductions:
    """Reduces the gradients of buckets, and adds the results to the sums, in the order in which they were started."""

    def __init__(
        self,
        buckets: Iterable[Bucket],
        comm: Comm,
        policy: ReducePolicy,
        norms: ArrivedNorms,
        early: NoEarlySteps,
    ) -> None:
        buckets = list(buckets)
        self._comm, self._policy, self._norms, self._early = comm, policy, norms, early
        self._sums = {id(b): Sums(b, tree=policy.tree, norms=norms) for b in buckets}
        self._pieces = {
            id(b): PieceReduce(b.layout, b.ranks) for b in buckets if takes_pieces(b, comm, policy.wire)
        }
        """[Note: reduction without copying]"""
        self._in_progress: list[BucketReduction] = []
        self._sending: BucketReduction | None = None
        """The last reduction whose result was added; other ranks may still read its gradients, [Note: received and
        sent]."""

    def sums_of(self, bucket: Bucket) -> Sums:
        return self._sums[id(bucket)]

    def buffer_for(self, bucket: Bucket) -> GradBuffer | FreshGrads:
        """Returns an object that collects the gradients of one micro-batch until they are reduced."""
        if id(bucket) in self._pieces:
            return FreshGrads(bucket.layout, bucket.dtype, bucket.device)
        return whole_buffer(bucket, bucket.dtype)

    def start(self, bucket: Bucket, source: GradBuffer | FreshGrads, *, last: bool | None) -> None:
        """Starts to reduce `source`; missing gradients count as zeros. Collective.

        Args:
            last: whether the sums are complete once the gradients of this backward have been added; None: unknown.
        """
        sums = self.sums_of(bucket)
        wire, out = self._policy.wire, sums.output()
        if last is not False:
            sums.prefetch()
        with span(f"ds.zero.reduce_scatter/{bucket.layout.name}"), torch.no_grad():
            if isinstance(source, FreshGrads):
                pieces = self._pieces[id(bucket)]
                reduction = launch_pieces(bucket, source.take(), pieces, self._comm, wire, out)
            else:
                source.zero_missing()
                send = launch_rows if bucket.layout.by_rows else launch
                reduction = send(bucket, source.tensor, self._comm, wire, out)
        self._in_progress.append(reduction)
        # At most three buckets of gradients are in memory, whatever the size of the model: one is filled by backward,
        # one is being reduced, and one may still be read by other ranks.
        while len(self._in_progress) > (1 if self._policy.overlap else 0):
            self._finish(self._in_progress.pop(0), last=last)

    def reduced(self, bucket: Bucket, source: GradBuffer) -> Tensor:
        """Returns this rank's slice of the reduction of `source`, without adding it to the sums. Collective."""
        return launch(bucket, source.tensor, self._comm, self._policy.wire, used=False).result()

    def finish_all(self, *, last: bool | None) -> None:
        """Waits for all reductions, and adds their results."""
        while self._in_progress:
            self._finish(self._in_progress.pop(0), last=last)
        self.wait_sent()
        for sums in self._sums.values():
            sums.settle()

    def end_arrivals(self) -> None:
        """Called when all gradients of a backward have been added to the sums."""
        self._norms.end_arrivals()
        self._early.end_arrivals()

    @property
    def are_complete(self) -> bool:
        """Whether `complete` has nothing to do."""
        return all(sums.is_complete for sums in self._sums.values())

    def complete(self) -> None:
        """Completes the sums, see `Sums.complete`."""
        with torch.no_grad():
            for sums in self._sums.values():
                sums.complete(self._comm)
                sums.take_in_memory()

    def drop(self) -> None:
        """Waits for the reductions in progress, and drops their results."""
        self.wait_sent()
        while self._in_progress:
            reduction = self._in_progress.pop(0)
            reduction.wait()
            self.sums_of(reduction.bucket).drop_output()

    def partial_sums(self) -> list[Tensor]:
        """Returns the memory of partial sums over micro-batches, [Note: tree over micro-batches]."""
        return [t for sums in self._sums.values() for t in sums.partial_sums()]

    def _finish(self, reduction: BucketReduction, *, last: bool | None) -> None:
        self.wait_sent()
        self._sending = reduction
        sums = self.sums_of(reduction.bucket)
        with torch.no_grad():
            sums.add(reduction.result(), measure=last is not False)
            if last:
                sums.complete(self._comm)
        values = sums.take_in_memory()
        if last is not False and sums.is_complete:
            self._early.arrived(reduction.bucket, values)
        if not self._policy.overlap:
            self.wait_sent()

    def wait_sent(self) -> None:
        """Waits until no other rank needs the gradients of the last finished reduction, and frees them, [Note: received
        and sent].
        """
        sending, self._sending = self._sending, None
        if sending is not None:
            sending.wait_sent()
