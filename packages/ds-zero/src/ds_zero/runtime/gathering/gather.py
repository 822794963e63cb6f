"""Gathers the buckets of stage 3 when a module needs them and drops them when nobody does."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from ds_zero.comm.collectives import Comm
from ds_zero.comm.watchdog import Waiting
from ds_zero.comm.works import wait_received, wait_sent
from ds_zero.interfaces import Work
from ds_zero.runtime.bucket import Bucket, BucketState
from ds_zero.runtime.profiler_ranges import span


class Gatherer:
    """Counts the users of each gathered bucket; the last one to leave drops it.

    Every method is collective: all ranks call it in the same order with the same buckets.
    """

    def __init__(self, buckets: list[Bucket], comm: Comm, waiting: Waiting | None = None) -> None:
        self._comm, self._waiting = comm, waiting or Waiting()
        self._buckets = [b for b in buckets if not b.whole]
        self._users = {id(b): 0 for b in self._buckets}
        self._works: dict[int, Work] = {}
        self._loading: deque[tuple[Bucket, Work | None]] = deque()
        """Buckets whose own part is on its way from the store. While one is loaded, the module before it computes."""
        self._pinned: set[int] = set()
        """Buckets that are held until `unpin`, or the next step."""
        self._numbers = {id(b): i + 1 for i, b in enumerate(self._buckets)}

    def start(self, bucket: Bucket) -> None:
        """Begin to gather; nothing happens if the bucket is whole, gathered or on its way."""
        if bucket.state is not BucketState.SHARDED:
            return
        with torch.no_grad():
            loading = bucket.begin_gather()
        self._send_loaded()
        self._loading.append((bucket, loading))
        if loading is None:
            self._send_loaded()

    def _send_loaded(self) -> None:
        """Begin the gathers of buckets whose own part had to be loaded first, in the order of `start` on every rank."""
        while self._loading:
            bucket, loading = self._loading.popleft()
            try:
                if loading is not None:
                    loading.wait()
            except BaseException:
                bucket.drop()
                raise
            with span(f"ds.zero.all_gather/{bucket.layout.name}"), torch.no_grad():
                self._works[id(bucket)] = bucket.start_gather(self._comm, self._numbers[id(bucket)])

    def finish(self, bucket: Bucket, *, late: bool = False) -> None:
        """Return when the parameters show their values. With `late` they must not be written until the bucket is
        dropped: other ranks may not have taken this rank's part yet, [Note: received and sent].
        """
        self.start(bucket)
        if bucket.state is BucketState.GATHERING:
            self._send_loaded()
            work = self._works.pop(id(bucket), None)  # None: it failed before
            if work is not None:
                with self._waiting.guard(f"the values of bucket {bucket.layout.name}"):
                    wait_received(work)
                self._works[id(bucket)] = work
            with torch.no_grad():
                bucket.end_gather()
        if not late:
            self._wait_sent(bucket)

    def _wait_sent(self, bucket: Bucket) -> None:
        work = self._works.pop(id(bucket), None)
        if work is not None:
            with self._waiting.guard(f"other ranks to take the values of bucket {bucket.layout.name}"):
                wait_sent(work)

    def acquire(self, buckets: list[Bucket], *, late: bool = False) -> None:
        """Gather and hold until `release`; `late` as in `finish`."""
        for bucket in buckets:
            self.start(bucket)
        for bucket in buckets:
            if not bucket.whole:
                self.finish(bucket, late=late)
                self._users[id(bucket)] += 1

    def holds(self, buckets: list[Bucket]) -> bool:
        """Whether a call already holds all of them. Those that are only pinned are not counted: a pin may end between
        forward and backward.
        """
        return all(b.whole or self._users[id(b)] > (id(b) in self._pinned) for b in buckets)

    def pin(self, buckets: Sequence[Bucket]) -> None:
        """Start to gather, and hold until `unpin` or the next step; `finish` tells when the values are there."""
        for bucket in buckets:
            if not bucket.whole and id(bucket) not in self._pinned:
                self._pinned.add(id(bucket))
                self._users[id(bucket)] += 1
                self.start(bucket)

    def unpin(self, buckets: Sequence[Bucket]) -> None:
        """Undo `pin`, and drop what no call holds."""
        for bucket in buckets:
            if id(bucket) in self._pinned:
                self._pinned.remove(id(bucket))
                self._users[id(bucket)] -= 1
            if not bucket.whole and self._users[id(bucket)] == 0:
                self.drop(bucket)

    def is_pinned(self, bucket: Bucket) -> bool:
        """Whether `pin` holds it."""
        return id(bucket) in self._pinned

    def release(self, buckets: list[Bucket], keep: bool = False) -> None:
        """Undo one `acquire`; with `keep` the last one leaves the values there, to be dropped by
        `drop_unused` or a new step.
        """
        for bucket in buckets:
            if bucket.whole:
                continue
            self._users[id(bucket)] -= 1
            assert self._users[id(bucket)] >= 0, (
                f"bucket {bucket.layout.name} released more often than acquired"
            )
            if self._users[id(bucket)] == 0 and not keep:
                self.drop(bucket)

    def drop(self, bucket: Bucket) -> None:
        """Give the gathered memory back."""
        if bucket.state is BucketState.GATHERING:
            self.finish(bucket)  # messages still arrive in the buffer
        if bucket.state is BucketState.GATHERED:
            self._wait_sent(bucket)
            bucket.drop()

    def drop_all(self) -> None:
        """After a step (copies are stale) or a failed forward (counts are void)."""
        self._pinned.clear()
        for bucket in self._buckets:
            self._users[id(bucket)] = 0
            self.drop(bucket)
            if bucket.trainable:
                bucket.changed()

    def drop_unused(self) -> None:
        """At the end of a backward: what was gathered ahead and not used after all."""
        for bucket in self._buckets:
            if self._users[id(bucket)] == 0:
                self.drop(bucket)

    def gathered_bytes(self) -> int:
        return sum(
            b.full.untyped_storage().nbytes()
            for b in self._buckets
            if b.state in (BucketState.GATHERED, BucketState.GATHERING)
        )
