"""A transport over the ranks of a process group.

[Note: messages]
A message is an envelope of fixed size (label, size of the header), then the header, then the tensors. The header is the
pickled skeleton of the value, with shapes and dtypes. It is left out if it equals that of the previous message with the
same stage and operation, so that in most steps a message is the envelope and the tensors.

Sends are started by the caller: a thread would first have to get Python's lock from it, which takes up to 5 ms while
it computes. One thread for each rank to which this one sends only waits until tensors are gone. One for each rank from
which it receives takes messages, so that shapes may vary without an agreement, and a caller that waits can look for
failures. It takes a message only after `expect`, so that the schedule decides how many messages lie in memory.

gloo transfers a tensor only once its receive has started, which costs a message in the other direction if the receiver
has to read the envelope first. So when two messages in a row had the same header, both sides expect it again: the
receiver starts to receive the tensors together with the envelope, and a sender whose header differs nevertheless first
sends tensors of the old shapes, which are thrown away. (Only in the memory of the host: NCCL runs the messages between
two ranks one after the other, so that a receive that waits would block the sends behind it.)
"""

from __future__ import annotations

import pickle
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_pipe.actions import Action, Op
from ds_pipe.errors import PipelineError
from ds_pipe.executor.failures import POLL_S, FailureBoard, StoreBoard, default_store
from ds_pipe.executor.values import Slot, put_together, slots, take_apart

_TAG = 7411
_OPS = (Op.RECV_FORWARD, Op.RECV_BACKWARD)
_ENVELOPE = 4  # stage, operation, micro-batch, bytes of the header


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
        self._arrival = threading.Condition()
        self._arrived: dict[tuple[int, Action], Any] = {}
        self._error: str | None = None
        self._senders: dict[int, tuple[_Sending, _Worker]] = {}
        self._receivers: dict[int, _Worker] = {}
        self._step = 0

    def send(self, rank: int, label: Action, value: Any) -> None:
        self._check()
        if rank not in self._senders:
            sending = _Sending(self._group, self._ranks[rank])
            self._senders[rank] = sending, _Worker(f"send to {rank}", _wait_until_gone, self._failed)
        sending, waiting = self._senders[rank]
        try:
            waiting.put(label, sending(label, value))
        except RuntimeError as error:
            self._failed(f"send to {rank}", label, error)
            self._check()

    def expect(self, rank: int, label: Action) -> None:
        if rank not in self._receivers:
            receiving = _Receiving(self._group, self._ranks[rank], self._device)

            def deliver(label: Action, _: Any) -> None:
                value = receiving(label, None)
                with self._arrival:
                    self._arrived[rank, label] = value
                    self._arrival.notify_all()

            self._receivers[rank] = _Worker(f"receive from {rank}", deliver, self._failed)
        self._receivers[rank].put(label, None)

    def receive(self, rank: int, label: Action) -> Any:
        end = time.monotonic() + self._timeout_s
        key = rank, label
        with self._arrival:
            while key not in self._arrived:
                if not self._arrival.wait(POLL_S) or self._error is not None:
                    if key in self._arrived:
                        break
                    self._check(ask=True)
                    if time.monotonic() > end:
                        raise PipelineError(f"rank {rank} has not sent {label} within {self._timeout_s:g} s")
            return self._arrived.pop(key)

    def finish(self) -> None:
        while not self._board.arrive(self._step):
            self._check(ask=True)
        self._step += 1

    def _failed(self, what: str, label: Action, error: Exception) -> None:
        with self._arrival:
            text = error if isinstance(error, PipelineError) else f"{type(error).__name__}: {error}"
            self._error = self._error or f"{what}, {label}: {text}"
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
        workers = [*(worker for _, worker in self._senders.values()), *self._receivers.values()]
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.join(1.0)
        if any(worker.is_alive() for worker in workers):
            break_connections(self._group, [self._ranks[r] for r in {*self._senders, *self._receivers}])
            for worker in workers:
                worker.join(5.0)
        self._senders.clear()
        self._receivers.clear()


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
            work = dist.irecv(torch.zeros(1), rank, group, tag=_TAG + 1)
            if work is not None:
                work.wait(timedelta(milliseconds=1))
        except RuntimeError:
            continue


class _Worker:
    """A thread that handles labelled values in order, until one fails."""

    def __init__(
        self,
        what: str,
        handle: Callable[[Action, Any], None],
        failed: Callable[[str, Action, Exception], None],
    ) -> None:
        self._what, self._handle, self._failed = what, handle, failed
        self._queue: queue.SimpleQueue[tuple[Action, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"ds_pipe: {what}", daemon=True)
        self._thread.start()

    def put(self, label: Action, value: Any) -> None:
        self._queue.put((label, value))

    def stop(self) -> None:
        self._queue.put(None)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._handle(*item)
            except Exception as error:  # noqa: BLE001  # handed to the thread that waits
                self._failed(self._what, item[0], error)
                return


@dataclass
class _Known:
    """What both sides know of the last message with one stage and operation, [Note: messages]."""

    header: bytes = b""
    skeleton: Any = None
    repeats: int = 0
    """How many messages in a row have had this header."""

    def note(self, header: bytes, skeleton: Any) -> None:
        self.repeats = self.repeats + 1 if header == self.header else 1
        self.header, self.skeleton = header, skeleton

    def early(self) -> list[Slot]:
        """The tensors whose receive starts together with that of the envelope."""
        expected = slots(self.skeleton) if self.repeats >= 2 else []
        return expected if all(slot.on_host for slot in expected) else []


_Running = list[tuple[Tensor, dist.Work]]
"""Tensors that are being sent. They must live until they are gone."""


def _wait_until_gone(label: Action, running: _Running) -> None:
    while running:
        running[0][1].wait()
        del running[0]


class _Sending:
    """Starts to send messages to one rank, [Note: messages]."""

    def __init__(self, group: dist.ProcessGroup, rank: int) -> None:
        self._group, self._rank = group, rank
        self._known: dict[tuple[int, Op], _Known] = defaultdict(_Known)

    def __call__(self, label: Action, value: Any) -> _Running:
        assert label.microbatch is not None
        skeleton, tensors = take_apart(value)
        header, last = pickle.dumps(skeleton), self._known[label.stage, label.op]
        changed = header != last.header
        parts = [
            torch.tensor([label.stage, _OPS.index(label.op), label.microbatch, len(header) if changed else 0])
        ]
        if changed:
            parts += [torch.zeros(slot.shape, dtype=slot.dtype) for slot in last.early()]
            parts.append(torch.frombuffer(bytearray(header), dtype=torch.uint8))
        last.note(header, skeleton)
        parts += [tensor.detach().contiguous() for tensor in tensors]
        running: _Running = []
        for part in parts:
            if part.numel():
                work = dist.isend(part, self._rank, self._group, tag=_TAG)
                assert work is not None
                running.append((part, work))
        return running


class _Receiving:
    """Receives messages from one rank, [Note: messages]."""

    def __init__(self, group: dist.ProcessGroup, rank: int, device: torch.device) -> None:
        self._group, self._rank, self._device = group, rank, device
        self._known: dict[tuple[int, Op], _Known] = defaultdict(_Known)

    def __call__(self, label: Action, _: None) -> Any:
        last = self._known[label.stage, label.op]
        envelope = self._started(torch.empty(_ENVELOPE, dtype=torch.int64))
        early = [self._of(slot) for slot in last.early()]
        stage, op, microbatch, size = envelope().tolist()
        arrived = Action(stage, _OPS[op], microbatch)
        if arrived != label:
            raise PipelineError(f"{arrived} has arrived where {label} was expected")
        tensors = [finished() for finished in early]
        if size:
            header = bytes(self._started(torch.empty(size, dtype=torch.uint8))().numpy())
            last.note(header, pickle.loads(header))
        else:
            last.note(last.header, last.skeleton)
        wanted = slots(last.skeleton)
        if size or not early:
            tensors = [self._of(slot)() for slot in wanted]
        for slot, tensor in zip(wanted, tensors, strict=True):
            tensor.requires_grad_(slot.requires_grad)
        return put_together(last.skeleton, tensors)

    def _of(self, slot: Slot) -> Callable[[], Tensor]:
        device = torch.device("cpu") if slot.on_host else self._device
        return self._started(torch.empty(slot.shape, dtype=slot.dtype, device=device))

    def _started(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Starts to receive a tensor; the result waits for it."""
        work = dist.irecv(tensor, self._rank, self._group, tag=_TAG) if tensor.numel() else None

        def finished() -> Tensor:
            if work is not None:
                work.wait()
            return tensor

        return finished
