"""Collectives of bytes and of sums over one process group, counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from ds_comm.exchange import wire


class Work(Protocol):
    """An asynchronous operation; `wait` returns when its result may be read (on a GPU: by the current stream)."""

    def wait(self) -> object:
        """Waits for the operation."""


class Done(dist.Work):
    """An operation that has ended already."""

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Returns at once."""
        return True


class Chain(dist.Work):
    """Operations of which each starts when the one before has ended.

    The next operation is started by `wait`, in the thread that calls it, and not in the background: ranks must start
    their collectives in the same order, which only the caller knows. Several chains advance together if one waits for
    them in the order in which they were started.
    """

    def __init__(self, first: Work, *rest: Callable[[], Work | None]) -> None:
        super().__init__()
        self._pending: Work | None = first
        self._rest = list(rest)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Waits for the last operation, as long as the process group's timeout permits."""
        while self._pending is not None:
            self._pending.wait()
            self._pending = None
            while self._rest and self._pending is None:
                self._pending = self._rest.pop(0)()
        return True


@dataclass
class Traffic:
    """What one rank has sent through a channel."""

    num_calls: int = 0
    """Collectives that were started."""
    num_bytes: int = 0
    """Bytes of their payload that this rank sent, by the formulas of `wire`."""

    def add(self, num_bytes: int) -> None:
        """Counts one collective."""
        self.num_calls += 1
        self.num_bytes += num_bytes


class Channel:
    """A process group, or a single process if torch.distributed is not initialised."""

    def __init__(self, group: dist.ProcessGroup | None = None, traffic: Traffic | None = None) -> None:
        """Args:
        group: None: the default group, or a single process if there is none.
        traffic: where bytes are counted; None: a new counter.
        """
        self._group = group
        alone = group is None and not (dist.is_available() and dist.is_initialized())
        self.rank = 0 if alone else dist.get_rank(group)
        self.world_size = 1 if alone else dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(
                f"rank {dist.get_rank()} is not in the process group of {self.world_size} ranks that was passed; "
                f"only its members may make a channel"
            )
        self.traffic = Traffic() if traffic is None else traffic

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group; None: the default one."""
        return self._group

    def all_to_all(
        self, output: Tensor, input: Tensor, piece_bytes: Sequence[int], out_bytes: Sequence[int]
    ) -> Work:
        """Sends consecutive pieces of `input` (uint8) to the ranks; `output` receives theirs in order of rank."""
        self.traffic.add(wire.all_to_all_bytes(piece_bytes, self.rank))
        if self.world_size == 1:
            output.copy_(input)
            return Done()
        return _started(
            dist.all_to_all_single(
                output, input, list(out_bytes), list(piece_bytes), group=self._group, async_op=True
            )
        )

    def all_gather(self, output: Tensor, own: Tensor, out_bytes: Sequence[int]) -> Work:
        """`output` (uint8) receives the tensors of all ranks in order, of `out_bytes` bytes each.

        Sent as an all-to-all of views of one tensor: pieces may have different sizes, and gloo's own all-gather sends
        every byte several times.
        """
        self.traffic.add(wire.all_gather_bytes(own.numel(), self.world_size))
        if self.world_size == 1:
            output.copy_(own)
            return Done()
        pieces = list(output.split(list(out_bytes)))
        return _started(
            dist.all_to_all(pieces, [own] * self.world_size, group=self._group, async_op=True)
            if dist.get_backend(self._group) != "gloo"
            else self._gather_by_gloo(output, own, out_bytes)
        )

    def _gather_by_gloo(self, output: Tensor, own: Tensor, out_bytes: Sequence[int]) -> Any:
        repeated = own.repeat(self.world_size)  # gloo has no all-to-all of lists
        return dist.all_to_all_single(
            output,
            repeated,
            list(out_bytes),
            [own.numel()] * self.world_size,
            group=self._group,
            async_op=True,
        )

    def all_reduce(self, x: Tensor, op: Any = None) -> Work:
        """Adds `x` over the ranks, in place."""
        self.traffic.add(wire.all_reduce_bytes(x.nbytes, self.world_size))
        if self.world_size == 1:
            return Done()
        return _started(
            dist.all_reduce(x, dist.ReduceOp.SUM if op is None else op, group=self._group, async_op=True)
        )

    def broadcast(self, x: Tensor) -> None:
        """Copies `x` from the group's first rank to the others."""
        if self.world_size > 1:
            self.traffic.add(x.nbytes * (self.world_size - 1) if self.rank == 0 else 0)
            dist.broadcast(x, group=self._group, group_src=0)


def _started(work: Any) -> Work:
    return Done() if work is None else work
