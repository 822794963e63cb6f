"""A transport over the ranks of a process group.

Tensors in the memory of the host are sent and received by the thread that computes, [Note: messages]; those on an
accelerator with the help of threads (`device_messages`). It takes a message only after `expect`, so that the schedule
decides how many messages lie in memory. While it waits, a thread looks for failures, [Note: waiting].
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ds_pipe.actions import Action, Op
from ds_pipe.errors import PipelineError
from ds_pipe.executor.device_messages import Receiving, Sending, Worker, wait_until_gone
from ds_pipe.executor.failures import POLL_S, FailureBoard, StoreBoard, default_store
from ds_pipe.executor.host_messages import FIRST_TAG, Incoming, Outgoing, Running
from ds_pipe.executor.watch import Watch

HELD_MESSAGES = 4
"""How many messages to a rank are held before a thread waits until they are gone."""
_Channel = tuple[int, int, Op]
"""Rank, stage and operation."""


class GroupTransport:
    """The transport of this rank in a process group whose ranks are the pipeline ranks."""

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        device: torch.device | None = None,
        timeout_s: float = 1800.0,
        board: FailureBoard | None = None,
    ) -> None:
        """Connects nothing yet.

        Args:
            group: the group; nothing else may send messages in it. None: the default group.
            device: device of received tensors. Default: the CPU.
            timeout_s: seconds after which a receive that nothing answers is an error.
            board: where failures are reported. Default: the store of the default process group.
        """
        chosen = dist.group.WORLD if group is None else group
        if chosen is None:
            raise ValueError(
                "the default process group is not initialised: call dist.init_process_group first"
            )
        self._group: dist.ProcessGroup = chosen
        self._ranks = dist.get_process_group_ranks(self._group)
        self._device = torch.device("cpu") if device is None else device
        self._timeout_s = timeout_s
        name = str(self._group.group_name)
        self._board = board or StoreBoard(default_store(), name, len(self._ranks))
        self._watch = Watch(self._board, f"watch over {name}")
        self._arrival = threading.Condition()
        self._arrived: dict[tuple[int, Action], Any] = {}
        self._error: str | None = None
        self._outgoing: dict[_Channel, Outgoing] = {}
        self._incoming: dict[_Channel, Incoming] = {}
        self._held: dict[int, Running] = {}
        """Rank -> what is being sent to it."""
        self._gone: dict[int, Worker] = {}
        """Rank -> a thread that waits until tensors are sent."""
        self._senders: dict[int, Sending] = {}
        self._receivers: dict[int, Worker] = {}
        self._step = 0

    @property
    def _on_host(self) -> bool:
        return self._device.type == "cpu"

    def send(self, rank: int, label: Action, value: Any) -> None:
        self._check()
        held = self._held.setdefault(rank, [])
        try:
            if self._on_host:
                key = rank, label.stage, label.op
                if key not in self._outgoing:
                    self._outgoing[key] = Outgoing(self._group, self._ranks[rank], label)
                held += self._outgoing[key].send(label, value)
            else:
                if rank not in self._senders:
                    self._senders[rank] = Sending(self._group, self._ranks[rank])
                held += self._senders[rank](label, value)
        except RuntimeError as error:
            self._failed(f"send to {rank}", label, error)
            self._check()
        if len(held) > HELD_MESSAGES:
            self._release(rank, label)

    def _release(self, rank: int, label: Action) -> None:
        """Lets a thread wait until messages are gone. Each time it needs Python's lock, so not for each message."""
        if rank not in self._gone:
            self._gone[rank] = Worker(f"send to {rank}", wait_until_gone, self._failed)
        self._gone[rank].put(label, self._held.pop(rank))

    def expect(self, rank: int, label: Action) -> None:
        if self._on_host:
            key = rank, label.stage, label.op
            if key not in self._incoming:
                self._incoming[key] = Incoming(self._group, self._ranks[rank], label)
            try:
                self._incoming[key].expect(label)
            except RuntimeError as error:
                self._failed(f"receive from {rank}", label, error)
                self._check()
            return
        if rank not in self._receivers:
            receiving = Receiving(self._group, self._ranks[rank], self._device)

            def deliver(label: Action, _: Any) -> None:
                value = receiving(label)
                with self._arrival:
                    self._arrived[rank, label] = value
                    self._arrival.notify_all()

            self._receivers[rank] = Worker(f"receive from {rank}", deliver, self._failed)
        self._receivers[rank].put(label, None)

    def receive(self, rank: int, label: Action) -> Any:
        key = rank, label
        late = f"rank {rank} has not sent {label} within {self._timeout_s:g} s"
        if not self._on_host:
            return self._delivered(key, late)
        channel = self._incoming[rank, label.stage, label.op]
        while key not in self._arrived:
            try:
                with self._watch.over(partial(self._leave, rank), self._timeout_s, late):
                    first, value = channel.take()
            except (RuntimeError, PipelineError) as error:
                self._failed(f"receive from {rank}", label, error)
                self._check()
            self._arrived[rank, first] = value
        return self._arrived.pop(key)

    def _delivered(self, key: tuple[int, Action], late: str) -> Any:
        """What a thread has received."""
        end = time.monotonic() + self._timeout_s
        with self._arrival:
            while key not in self._arrived:
                if not self._arrival.wait(POLL_S) or self._error is not None:
                    if key in self._arrived:
                        break
                    self._check(ask=True)
                    if time.monotonic() > end:
                        raise PipelineError(late)
            return self._arrived.pop(key)

    def _leave(self, rank: int) -> None:
        break_connections(self._group, [self._ranks[rank]])

    def finish(self) -> None:
        while not self._board.arrive(self._step):
            self._check(ask=True)
        self._step += 1
        self._settle()

    @contextmanager
    def watched(self, end: Callable[[], None]) -> Iterator[None]:
        try:
            with self._watch.over(end):
                yield
        except RuntimeError as error:
            with self._arrival:
                self._error = self._error or f"{type(error).__name__}: {error}"
            self._check()
        self._settle()

    def _settle(self) -> None:
        """Drops what has been sent, after all ranks have received everything."""
        for running in self._held.values():
            for _, work in running:
                work.wait()
        self._held.clear()

    def _failed(self, what: str, label: Action, error: Exception) -> None:
        with self._arrival:
            text = error if isinstance(error, PipelineError) else f"{type(error).__name__}: {error}"
            self._error = self._error or self._watch.message or f"{what}, {label}: {text}"
            self._arrival.notify_all()

    def _check(self, *, ask: bool = False) -> None:
        """Raises what is known; what another rank has reported is closer to the cause than a broken connection."""
        if self._error is not None or ask:
            message = self._board.read()
            end = time.monotonic() + 4 * POLL_S
            while message is None and self._error is not None and time.monotonic() < end:
                time.sleep(POLL_S / 5)
                message = self._board.read()
            if message is not None or self._error is not None:
                raise PipelineError(message or self._error)

    def fail(self, message: str) -> str:
        return self._board.report(message)

    def close(self) -> None:
        """Ends the threads. After a failure this also breaks the connections on which they wait, so that the process
        group cannot be used any more.
        """
        for rank in [*self._held]:
            self._release(rank, Action(0, Op.SEND_FORWARD, 0))
        workers = [*self._gone.values(), *self._receivers.values()]
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.join(1.0)
        if self._error is not None or any(worker.is_alive() for worker in workers):
            every = {
                *self._gone,
                *self._receivers,
                *(rank for rank, _, _ in (*self._incoming, *self._outgoing)),
            }
            break_connections(self._group, [self._ranks[r] for r in sorted(every)])
            for worker in workers:
                worker.join(5.0)
        self._watch.stop()
        for kept in (self._gone, self._receivers, self._senders, self._incoming, self._outgoing):
            kept.clear()


def break_connections(group: dist.ProcessGroup, ranks: Iterable[int]) -> None:
    """Makes everything that waits in a group of gloo for this rank, or here for those ranks, end with an error.

    The group cannot be used afterwards.

    Args:
        group: the group.
        ranks: global ranks to which this one closes its connections.
    """
    # A receive that ends by its own timeout closes the connection of gloo; all that waits on it ends with an error.
    for rank in ranks:
        try:
            work = dist.irecv(torch.zeros(1), rank, group, tag=FIRST_TAG - 1)
            if work is not None:
                work.wait(timedelta(milliseconds=1))
        except RuntimeError:
            continue
