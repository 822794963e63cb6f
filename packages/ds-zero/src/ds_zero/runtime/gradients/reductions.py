"""The reductions that are under way, and the sums that their results are added to."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ds_zero.comm.collectives import Comm
from ds_zero.comm.piece_exchange import PieceReduce
from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.gradients.accumulate import Sums
from ds_zero.runtime.gradients.grad_buffer import FreshGrads, GradBuffer
from ds_zero.runtime.gradients.reduce_bucket import Flight, launch, launch_pieces, takes_pieces
from ds_zero.runtime.gradients.reduce_policy import ReducePolicy
from ds_zero.runtime.gradients.sparse_rows import launch_rows
from ds_zero.runtime.profiler_ranges import span


def whole_buffer(bucket: Bucket, dtype: torch.dtype) -> GradBuffer:
    """Room for the gradients of a whole bucket."""
    return GradBuffer(bucket.layout, dtype, bucket.device)


class Reductions:
    """Sends whole gradients of buckets and adds the slices that come back, in the order in which they were started."""

    def __init__(self, buckets: Iterable[Bucket], comm: Comm, policy: ReducePolicy) -> None:
        buckets = list(buckets)
        self._comm, self._policy = comm, policy
        self._sums = {id(b): Sums(b, tree=policy.tree) for b in buckets}
        self._pieces = {
            id(b): PieceReduce(b.layout, b.ranks) for b in buckets if takes_pieces(b, comm, policy.wire)
        }
        """[Note: gradients where they lie]"""
        self._flights: list[Flight] = []
        self._landed: Flight | None = None
        """The last one that landed, [Note: received and sent]."""

    def sums_of(self, bucket: Bucket) -> Sums:
        return self._sums[id(bucket)]

    def room_for(self, bucket: Bucket) -> GradBuffer | FreshGrads:
        """What holds the gradients of one micro-batch until they travel."""
        if id(bucket) in self._pieces:
            return FreshGrads(bucket.layout, bucket.dtype, bucket.device)
        return whole_buffer(bucket, bucket.dtype)

    def start(self, bucket: Bucket, source: GradBuffer | FreshGrads, *, last: bool) -> None:
        """Start to reduce `source`; missing gradients count as zeros. Collective.

        Args:
            last: whether sums are final once all of this backward has been added.
        """
        wire, place = self._policy.wire, self.sums_of(bucket).place()
        with span(f"ds.zero.reduce_scatter/{bucket.layout.name}"), torch.no_grad():
            if isinstance(source, FreshGrads):
                pieces = self._pieces[id(bucket)]
                flight = launch_pieces(bucket, source.take(), pieces, self._comm, wire, place)
            else:
                source.zero_missing()
                send = launch_rows if bucket.layout.by_rows else launch
                flight = send(bucket, source.tensor, self._comm, wire, place)
        self._flights.append(flight)
        # One reduction is in flight and one settles while the next bucket fills: memory is bounded by three buckets,
        # whatever the model's size.
        while len(self._flights) > (1 if self._policy.overlap else 0):
            self._land(self._flights.pop(0), last=last)

    def tried(self, bucket: Bucket, source: GradBuffer) -> Tensor:
        """This rank's slice of the reduction of `source`, which is added to nothing. Collective."""
        return launch(bucket, source.tensor, self._comm, self._policy.wire).land()

    def land_all(self, *, last: bool) -> None:
        """Return when every result has been added."""
        while self._flights:
            self._land(self._flights.pop(0), last=last)
        self.wait_sent()
        for sums in self._sums.values():
            sums.settle()

    def complete(self) -> None:
        """Make the sums final."""
        with torch.no_grad():
            for sums in self._sums.values():
                sums.complete(self._comm)

    def drop(self) -> None:
        """Wait for what is under way, and add it to nothing."""
        self.wait_sent()
        while self._flights:
            self._flights.pop(0).wait()

    def waiting(self) -> list[Tensor]:
        """Sums of micro-batches that wait for others."""
        return [t for sums in self._sums.values() for t in sums.waiting()]

    def _land(self, flight: Flight, *, last: bool) -> None:
        self.wait_sent()
        self._landed = flight
        sums = self.sums_of(flight.bucket)
        with torch.no_grad():
            sums.add(flight.land())
            if last:
                sums.complete(self._comm)
        if not self._policy.overlap:
            self.wait_sent()

    def wait_sent(self) -> None:
        """Let the gradients of the flight that landed last go, [Note: received and sent]."""
        landed, self._landed = self._landed, None
        if landed is not None:
            landed.wait_sent()
