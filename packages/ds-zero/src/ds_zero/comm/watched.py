"""Collectives whose waits use the detection of stalled ranks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch.distributed as dist
from torch import Tensor

from ds_zero.comm.collectives import Comm, Pieces
from ds_zero.comm.ranks import Ranks
from ds_zero.comm.watchdog import Waiting
from ds_zero.comm.works import wait_received, wait_sent
from ds_zero.interfaces import Work


class Watched:
    """An operation whose `wait` uses the detection of stalled ranks."""

    def __init__(self, work: Work, waiting: Waiting, what: str) -> None:
        self._work, self._waiting, self._what = work, waiting, what

    def wait_received(self) -> None:
        with self._waiting.guard(self._what):
            wait_received(self._work)

    def wait_sent(self) -> None:
        with self._waiting.guard(self._what):
            wait_sent(self._work)

    def wait(self) -> None:
        self._waiting.wait(self._work, self._what)


class WatchedComm(Comm):
    """Wraps a `Comm`; waits for its operations use the detection of stalled ranks."""

    def __init__(self, inner: Comm, waiting: Waiting) -> None:
        self._inner, self._waiting = inner, waiting
        super().__init__(inner.all_gather, inner.reduce_scatter, axes=inner.axes, frozen=inner.frozen)

    @property
    def gathered_bytes(self) -> int:
        return self._inner.gathered_bytes

    @gathered_bytes.setter
    def gathered_bytes(self, value: int) -> None:
        self._inner.gathered_bytes += value  # the base class begins with zero

    @property
    def reduced_bytes(self) -> int:
        return self._inner.reduced_bytes

    @reduced_bytes.setter
    def reduced_bytes(self, value: int) -> None:
        self._inner.reduced_bytes += value

    def guard(self, what: str) -> AbstractContextManager[None]:
        return self._waiting.guard(what)

    def gather(
        self,
        whole: Tensor,
        ranks: Ranks,
        *,
        sizes: Sequence[int] | None = None,
        number: int = 0,
        frozen: bool = False,
    ) -> Work:
        work = self._inner.gather(whole, ranks, sizes=sizes, number=number, frozen=frozen)
        return Watched(work, self._waiting, "an all-gather")

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
        self._waiting.log.note("reduction", "")
        work = self._inner.reduce(out, whole, ranks, op, sizes=sizes, bucket=bucket)
        return Watched(work, self._waiting, "a reduction of gradients")

    def reduce_pieces(
        self, out: Tensor, grads: Sequence[Tensor], pieces: Pieces, op: dist.ReduceOp.RedOpType
    ) -> Work:
        self._waiting.log.note("reduction", "")
        work = self._inner.reduce_pieces(out, grads, pieces, op)
        return Watched(work, self._waiting, "a reduction of gradients")
