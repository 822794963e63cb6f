"""Collectives that are recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch.distributed as dist
from torch import Tensor

from ds_zero.comm.collectives import Comm, Pieces
from ds_zero.comm.ranks import Ranks
from ds_zero.comm.works import wait_received, wait_sent
from ds_zero.interfaces import CollectiveSet, RecordsCollectives, Work


class Logged:
    """An operation that has ended, for the record, when everything has been received."""

    def __init__(self, work: Work, log: RecordsCollectives, end: Callable[[], None]) -> None:
        self._work, self._log = work, log
        self._end: Callable[[], None] | None = end

    def wait_received(self) -> None:
        with self._log.inside():
            wait_received(self._work)
        end, self._end = self._end, None
        if end is not None:
            end()

    def wait_sent(self) -> None:
        with self._log.inside():
            wait_sent(self._work)

    def wait(self) -> None:
        self.wait_received()
        self.wait_sent()


class LoggedComm(Comm):
    """A `Comm` whose operations are recorded, with the bytes that it counts."""

    def __init__(self, inner: Comm, log: RecordsCollectives) -> None:
        super().__init__(
            inner.all_gather,
            inner.reduce_scatter,
            axes=inner.axes,
            connect=inner.connect,
            frozen=inner.frozen,
        )
        self._log = log

    def gather(
        self,
        whole: Tensor,
        ranks: Ranks,
        *,
        sizes: Sequence[int] | None = None,
        number: int = 0,
        frozen: bool = False,
    ) -> Work:
        start = partial(super().gather, whole, ranks, sizes=sizes, number=number, frozen=frozen)
        return self._recorded("all_gather", whole.nbytes, ranks.size, start)

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
        start = partial(super().reduce, out, whole, ranks, op, sizes=sizes, bucket=bucket)
        return self._recorded("reduce_scatter", whole.nbytes, ranks.size, start)

    def reduce_pieces(
        self, out: Tensor, grads: Sequence[Tensor], pieces: Pieces, op: dist.ReduceOp.RedOpType
    ) -> Work:
        start = partial(super().reduce_pieces, out, grads, pieces, op)
        num_bytes = sum(grad.nbytes for grad in grads)
        return self._recorded("reduce_scatter", num_bytes, pieces.num_ranks, start)

    def _recorded(self, operation: str, num_bytes: int, ranks: int, start: Callable[[], Work]) -> Work:
        end = self._log.begin(operation, num_bytes, ranks) if ranks > 1 else None
        if end is None:
            return start()
        before = self.gathered_bytes + self.reduced_bytes
        with self._log.inside():
            work = start()
        sent_bytes = self.gathered_bytes + self.reduced_bytes - before
        return Logged(work, self._log, partial(end, sent_bytes))


def logged(comm: Comm, given: Comm | CollectiveSet | None) -> Comm:
    """Returns `comm`, recorded if the collectives that were given to `shard` have a log."""
    log = None if given is None or isinstance(given, Comm) else given.log
    return comm if log is None else LoggedComm(comm, log)
