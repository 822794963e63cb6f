"""A transport between threads of one process: many stages without process groups."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ds_pipe.actions import Action
from ds_pipe.errors import PipelineError
from ds_pipe.executor.failures import POLL_S, MemoryBoard
from ds_pipe.executor.values import put_together, take_apart


class MemoryHub:
    """Connects the transports of all ranks."""

    def __init__(self, num_ranks: int) -> None:
        """Makes a hub for `num_ranks` ranks."""
        self.board = MemoryBoard(num_ranks)
        self.arrival = threading.Condition()
        self.queues: dict[tuple[int, int], deque[tuple[Action, Any]]] = defaultdict(deque)

    def transport(self, rank: int, *, timeout_s: float = 60.0) -> MemoryTransport:
        """Returns the transport of a rank."""
        return MemoryTransport(self, rank, timeout_s)


class MemoryTransport:
    """The transport of one rank."""

    def __init__(self, hub: MemoryHub, rank: int, timeout_s: float) -> None:
        """`MemoryHub.transport` makes it."""
        self._hub, self._rank, self._timeout_s = hub, rank, timeout_s
        self._step = 0
        self._expected: dict[int, deque[Action]] = defaultdict(deque)
        self._arrived: dict[tuple[int, Action], Any] = {}

    def send(self, rank: int, label: Action, value: Any) -> None:
        skeleton, tensors = take_apart(value)
        flags = [tensor.requires_grad for tensor in tensors]
        copies = [t.detach().clone().requires_grad_(f) for t, f in zip(tensors, flags, strict=True)]
        with self._hub.arrival:
            self._hub.queues[self._rank, rank].append((label, put_together(skeleton, copies)))
            self._hub.arrival.notify_all()

    def expect(self, rank: int, label: Action) -> None:
        self._expected[rank].append(label)

    def receive(self, rank: int, label: Action) -> Any:
        end = time.monotonic() + self._timeout_s
        with self._hub.arrival:
            self._take(rank)
            while (rank, label) not in self._arrived:
                self._hub.arrival.wait(POLL_S)
                self._take(rank)
                message = self._hub.board.read()
                if message is not None:
                    raise PipelineError(message)
                if time.monotonic() > end:
                    raise PipelineError(f"rank {rank} has not sent {label} within {self._timeout_s:g} s")
        return self._arrived.pop((rank, label))

    def _take(self, rank: int) -> None:
        """Takes the messages that have arrived and are expected."""
        queue, expected = self._hub.queues[rank, self._rank], self._expected[rank]
        while queue and expected:
            (arrived, value), label = queue.popleft(), expected.popleft()
            if arrived != label:
                raise PipelineError(f"rank {rank} has sent {arrived} where {label} was expected")
            self._arrived[rank, label] = value

    def finish(self) -> None:
        while not self._hub.board.arrive(self._step):
            message = self._hub.board.read()
            if message is not None:
                raise PipelineError(message)
        self._step += 1

    def watched(self, end: Callable[[], None]) -> AbstractContextManager[None]:
        return nullcontext()

    def fail(self, message: str) -> str:
        return self._hub.board.report(message)

    def close(self) -> None:
        """Needs nothing."""
