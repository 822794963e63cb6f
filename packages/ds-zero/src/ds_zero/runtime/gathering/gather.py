"""Gathers the buckets of stage 3 before a module uses them, and drops them afterwards."""

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
from ds_zero.runtime.storage import PARAM

LOADS_IN_FLIGHT = 2
"""Maximum number of buckets whose parts are being loaded from the store. With one, a disk has nothing to do between the
end of a read and the next call of `start`, and its queue runs empty at the end of every part.
"""


class Gatherer:
    """Gathers buckets and counts their users. A bucket is dropped when its count becomes 0.

    Every method is collective: all ranks call it in the same order with the same buckets.
    """

    def __init__(self, buckets: list[Bucket], comm: Comm, waiting: Waiting | None = None) -> None:
        self._comm, self._waiting = comm, waiting or Waiting()
        self._buckets = [b for b in buckets if not b.whole]
        self.loads = any(b.storage.is_away(PARAM) for b in self._buckets)
        """Whether parameters are loaded from where they cannot be addressed."""
        self._users = {id(b): 0 for b in self._buckets}
        self._works: dict[int, Work] = {}
        self._loading: deque[tuple[Bucket, Work | None]] = deque()
        """Buckets whose all-gather has not started, because this rank's part is still being loaded from the store."""
        self._pinned: set[int] = set()
        """`id` of the buckets that stay gathered until `unpin` or the next step."""
        self._numbers = _numbers(self._buckets)

    def start(self, bucket: Bucket) -> None:
        """Starts to gather. Has no effect if the bucket is whole, gathered or being gathered."""
        if bucket.state is not BucketState.SHARDED:
            return
        with torch.no_grad():
            loading = bucket.begin_gather()
        self._loading.append((bucket, loading))
        # The number, not what has arrived, decides which all-gathers start: all ranks start the same ones.
        if not self.loads:
            self._send_loaded(bucket)
        elif len(self._loading) > LOADS_IN_FLIGHT:
            self._send_loaded(self._loading[-1 - LOADS_IN_FLIGHT][0])

    def _send_loaded(self, last: Bucket) -> None:
        """Waits for parts that are being loaded, and starts the all-gathers of their buckets in order of `start`, up to
        bucket `last`.
        """
        if not any(bucket is last for bucket, _ in self._loading):
            return
        bucket = None
        while bucket is not last:
            bucket, loading = self._loading.popleft()
            try:
                if loading is not None:
                    loading.wait()
            except BaseException:
                bucket.drop()
                raise
            name = bucket.layout.name
            guarded = self._waiting.guard(f"the all-gather of bucket {name}")
            with guarded, span(f"ds.zero.all_gather/{name}"), torch.no_grad():
                self._works[id(bucket)] = bucket.start_gather(self._comm, self._numbers[id(bucket)])

    def finish(self, bucket: Bucket, *, late: bool = False) -> None:
        """Waits until the parameters have their values.

        Args:
            late: do not wait until the other ranks have received this rank's part, [Note: received and sent]. The
                parameters must then not be written until the bucket is dropped.
        """
        self.start(bucket)
        if bucket.state is BucketState.GATHERING:
            self._send_loaded(bucket)
            work = self._works.pop(id(bucket), None)  # None: an earlier wait for it raised
            if work is not None:
                with self._waiting.guard(f"the all-gather of bucket {bucket.layout.name}"):
                    wait_received(work)
                self._works[id(bucket)] = work
            with torch.no_grad():
                bucket.end_gather()
        if not late:
            self._wait_sent(bucket)

    def _wait_sent(self, bucket: Bucket) -> None:
        work = self._works.pop(id(bucket), None)
        if work is not None:
            with self._waiting.guard(f"other ranks to receive the values of bucket {bucket.layout.name}"):
                wait_sent(work)

    def acquire(self, buckets: list[Bucket], *, late: bool = False) -> None:
        """Gathers buckets and counts one more user of each, until `release`; `late` as in `finish`."""
        for bucket in buckets:
            self.start(bucket)
        for bucket in buckets:
            if not bucket.whole:
                self.finish(bucket, late=late)
                self._users[id(bucket)] += 1

    def holds(self, buckets: list[Bucket]) -> bool:
        """Whether all buckets have a user, other than a pin: a pin may end between forward and backward."""
        return all(b.whole or self._users[id(b)] > (id(b) in self._pinned) for b in buckets)

    def pin(self, buckets: Sequence[Bucket]) -> None:
        """Starts to gather buckets, which stay gathered until `unpin` or the next step. Call `finish` to wait."""
        for bucket in buckets:
            if not bucket.whole and id(bucket) not in self._pinned:
                self._pinned.add(id(bucket))
                self._users[id(bucket)] += 1
                self.start(bucket)

    def unpin(self, buckets: Sequence[Bucket]) -> None:
        """Undoes `pin`, and drops the buckets without users."""
        for bucket in buckets:
            if id(bucket) in self._pinned:
                self._pinned.remove(id(bucket))
                self._users[id(bucket)] -= 1
            if not bucket.whole and self._users[id(bucket)] == 0:
                self.drop(bucket)

    def is_pinned(self, bucket: Bucket) -> bool:
        """Whether the bucket is pinned."""
        return id(bucket) in self._pinned

    def release(self, buckets: list[Bucket], keep: bool = False) -> None:
        """Undoes one `acquire`. A bucket without users is dropped, or, with `keep`, stays gathered until `drop_unused`
        or the next step.
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
        """Frees the gathered memory, whatever the number of users."""
        if bucket.state is BucketState.GATHERING:
            self.finish(bucket)  # the memory is still being written
        if bucket.state is BucketState.GATHERED:
            self._wait_sent(bucket)
            bucket.drop()

    def drop_all(self) -> None:
        """Drops all buckets and resets all counts, after a step or a forward or backward that raised."""
        self._pinned.clear()
        for bucket in self._buckets:
            self._users[id(bucket)] = 0
            self.drop(bucket)
            if bucket.trainable:
                bucket.changed()

    def drop_unused(self) -> None:
        """Drops the buckets without users: those that were prefetched and not used, and those that were kept."""
        for bucket in self._buckets:
            if self._users[id(bucket)] == 0:
                self.drop(bucket)

    def gathered_bytes(self) -> int:
        return sum(
            b.full.untyped_storage().nbytes()
            for b in self._buckets
            if b.state in (BucketState.GATHERED, BucketState.GATHERING)
        )


def _numbers(buckets: Sequence[Bucket]) -> dict[int, int]:
    """Returns `id` of a bucket -> number of its gathers, counted from 1 among those over the same ranks: ranks that
    share some of their buckets (tied weights of pipeline stages) have different other ones.
    """
    counts: dict[int, int] = {}
    numbers = {}
    for bucket in buckets:
        counts[id(bucket.ranks)] = counts.get(id(bucket.ranks), 0) + 1
        numbers[id(bucket)] = counts[id(bucket.ranks)]
    return numbers
