"""Collectives between ranks that are all on one machine, [Note: same-host collectives] in ds_core."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm.interfaces import Abort
from ds_comm.log import CommsLog
from ds_comm.log.comms_log import End
from ds_core import same_host
from ds_core.same_host import Reduction, SameHostError


class Pending:
    """A collective that was started with `async_op=True`."""

    def __init__(self, run: Callable[[], None]) -> None:
        self._run = run
        self._done = threading.Event()
        self._error: Exception | None = None

    def execute(self) -> None:
        """Runs the collective, in the thread of its group."""
        try:
            self._run()
        except (RuntimeError, ValueError) as error:  # raised again where it is waited for
            self._error = error
        finally:
            self._run = _nothing  # lets go of the tensors
            self._done.set()

    def wait(self) -> None:
        """Returns when the result is there.

        Raises:
            SameHostError: the collective failed.
        """
        self._done.wait()
        if self._error is not None:
            raise self._error

    def is_completed(self) -> bool:
        """Whether `wait` returns at once."""
        return self._done.is_set()


class SameHostGroup:
    """Collectives between the ranks of a process group that are all processes of this machine; `connect` makes it.

    All ranks make the same calls in the same order. Tensors are contiguous and on the CPU. Sums are computed in the
    order of a fixed binary tree over ranks (bf16 and fp16 in fp32), so all ranks get the same bits, and the same bits
    in every run. With `async_op=True` a method returns at once, and one thread of this object runs the collectives in
    their order; the tensors must not be used before `wait()`.

    If a rank ends, raises or makes another call, every rank gets a `SameHostError` that names it, and the group cannot
    be used any more. Nothing of it is left in the system when the processes have ended, also after kill -9.
    """

    def __init__(self, team: same_host.Team, log: CommsLog | None = None) -> None:
        self._team, self._log = team, log
        self._queue: queue.SimpleQueue[Pending | None] | None = None
        self._last: Pending | None = None

    @property
    def rank(self) -> int:
        return self._team.rank

    @property
    def size(self) -> int:
        return self._team.size

    def barrier(self) -> None:
        """Returns when all ranks have called it."""
        self._start("barrier", 0, self._team.barrier, False)

    def all_reduce(self, tensor: Tensor, op: Reduction = "sum", async_op: bool = False) -> Pending | None:
        """Replaces `tensor` by its sum (or "mean", "max", "min") over ranks."""
        return self._start("all_reduce", tensor.nbytes, lambda: self._team.all_reduce(tensor, op), async_op)

    def reduce_scatter(
        self, output: Tensor, input: Tensor, op: Reduction = "sum", async_op: bool = False
    ) -> Pending | None:
        """Fills `output` with this rank's slice of the sum of `input`, which has `size` times the elements."""
        return self._start(
            "reduce_scatter", input.nbytes, lambda: self._team.reduce_scatter(output, input, op), async_op
        )

    def all_gather(
        self, output: Tensor, input: Tensor, sizes: Sequence[int] | None = None, async_op: bool = False
    ) -> Pending | None:
        """Fills `output` with the tensors of all ranks, one after the other. `input` may be this rank's part of it.

        Args:
            sizes: number of elements of each rank's tensor, if they differ.
        """
        return self._start(
            "all_gather", output.nbytes, lambda: self._team.all_gather(output, input, sizes), async_op
        )

    def broadcast(self, tensor: Tensor, source: int = 0, async_op: bool = False) -> Pending | None:
        """Replaces `tensor` by that of rank `source` of the group."""
        return self._start("broadcast", tensor.nbytes, lambda: self._team.broadcast(tensor, source), async_op)

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        output_sizes: Sequence[int] | None = None,
        input_sizes: Sequence[int] | None = None,
        async_op: bool = False,
    ) -> Pending | None:
        """Sends part p of `input` to rank p, and receives part p of `output` from it.

        Args:
            output_sizes, input_sizes: number of elements of each part; None: all parts have the same.
        """
        exchange = partial(self._team.all_to_all, output, input, output_sizes, input_sizes)
        return self._start("all_to_all", input.nbytes, exchange, async_op)

    def leave(self) -> None:
        """Ends all waits of this rank, and those of other ranks for it."""
        self._team.leave()

    def close(self) -> None:
        """Ends the thread and leaves the group. Safe to call twice. Call it when all ranks have finished."""
        if self._queue is not None:
            self._queue.put(None)
            self._queue = None
        self._team.leave()

    def _start(
        self, operation: str, num_bytes: int, run: Callable[[], None], async_op: bool
    ) -> Pending | None:
        if self._log is not None:
            run = _recorded(run, self._log.begin(operation, num_bytes, self.size))
        idle = self._last is None or self._last.is_completed()
        if idle and not async_op:
            run()
            return None
        work = self._last = Pending(run)
        if self._queue is None:
            self._queue = queue.SimpleQueue()
            threading.Thread(target=_work, args=(self._queue,), name="ds_comm.same_host", daemon=True).start()
        self._queue.put(work)
        if async_op:
            return work
        work.wait()
        return None


def _work(tasks: queue.SimpleQueue[Pending | None]) -> None:
    while (task := tasks.get()) is not None:
        task.execute()
        del task  # it holds tensors


def _nothing() -> None:
    return None


def _recorded(run: Callable[[], None], end: End | None) -> Callable[[], None]:
    """Returns `run`, followed by the end of its record."""

    def both() -> None:
        run()
        if end is not None:
            end()

    return both


def connect_group(
    group: dist.ProcessGroup | None = None,
    *,
    limit_s: float = 1800.0,
    abort: Abort | None = None,
    log: CommsLog | None = None,
) -> SameHostGroup | None:
    """Returns collectives through shared memory if all ranks of `group` are processes of one machine that may read each
    other's memory; otherwise None, on every rank. Collective.

    The system refuses between containers that hide their processes from each other, with `ptrace_scope` above 0, and
    where it is not Linux.

    Args:
        group: a process group that can send CPU tensors. Default: all ranks.
        limit_s: seconds after which a wait for another rank fails.
        abort: a flag that ends waits when it is raised.
        log: records the collectives.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    token = torch.tensor([int.from_bytes(os.urandom(7), "big")])
    segment = _segment(size) if rank == 0 else -1
    try:
        mine = torch.tensor([os.getpid(), token.data_ptr(), int(token), segment])
        contacts = [torch.empty_like(mine) for _ in range(size)]
        dist.all_gather(contacts, mine, group=group)
        team = _join(rank, [contact.tolist() for contact in contacts], limit_s)
        joined = torch.tensor([team is not None])
        table = [torch.empty_like(joined) for _ in range(size)]
        dist.all_gather(table, joined, group=group)
    finally:
        if segment >= 0:
            os.close(segment)
    if team is None or not all(bool(flag) for flag in table):
        return None
    made = SameHostGroup(team, log)
    if abort is not None:
        abort.add(made)
    return made


def _segment(size: int) -> int:
    try:
        return same_host.new_segment(size) if same_host.is_available() else -1
    except OSError:  # a sandbox without memfd_create
        return -1


def _join(rank: int, contacts: Sequence[Sequence[int]], limit_s: float) -> same_host.Team | None:
    pids = [contact[0] for contact in contacts]
    owner, _, _, segment = contacts[0]
    if segment < 0 or not same_host.is_available():
        return None
    if not all(same_host.reaches(pid, address, token) for pid, address, token, _ in contacts):
        return None
    try:
        opened = os.open(f"/proc/{owner}/fd/{segment}", os.O_RDWR)
        try:
            return same_host.Team(opened, rank, pids, limit_s)
        finally:
            os.close(opened)
    except (OSError, ValueError):  # ValueError: more ranks than a team can have
        return None


__all__ = ["Pending", "SameHostError", "SameHostGroup", "connect_group"]
