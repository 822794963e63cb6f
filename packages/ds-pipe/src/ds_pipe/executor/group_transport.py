"""A transport over the ranks of a process group.

[Note: messages]
A message is an envelope of fixed size (label, size of the header), then the header, then the tensors. The header is the
pickled skeleton of the value, with shapes and dtypes. It is left out if it equals that of the previous message with the
same stage and operation, so that in most steps a message is the envelope and the tensors.

One thread for each rank to which this one sends, and one for each rank from which it receives, work on queues: the
caller computes meanwhile, and shapes may vary without an agreement. A receiving thread takes a message only after
`expect`, so that the schedule decides how many messages lie in memory.
"""

from __future__ import annotations

import pickle
import queue
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_pipe.actions import Action, Op
from ds_pipe.errors import PipelineError
from ds_pipe.executor.failures import POLL_S, FailureBoard, StoreBoard, default_store
from ds_pipe.executor.values import put_together, slots, take_apart

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
        self._senders: dict[int, _Worker] = {}
        self._receivers: dict[int, _Worker] = {}
        self._step = 0

    def send(self, rank: int, label: Action, value: Any) -> None:
        self._check()
        if rank not in self._senders:
            self._senders[rank] = _Worker(
                f"send to {rank}", _Sending(self._group, self._ranks[rank]), self._failed
            )
        self._senders[rank].put(label, value)

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
        workers = [*self._senders.values(), *self._receivers.values()]
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


class _Sending:
    """Sends messages to one rank, [Note: messages]."""

    def __init__(self, group: dist.ProcessGroup, rank: int) -> None:
        self._group, self._rank = group, rank
        self._headers: dict[tuple[int, Op], bytes] = {}

    def __call__(self, label: Action, value: Any) -> None:
        skeleton, tensors = take_apart(value)
        header = pickle.dumps(skeleton)
        key = label.stage, label.op
        known = self._headers.get(key) == header
        self._headers[key] = header
        assert label.microbatch is not None
        size = 0 if known else len(header)
        self._send(torch.tensor([label.stage, _OPS.index(label.op), label.microbatch, size]))
        if not known:
            self._send(torch.frombuffer(bytearray(header), dtype=torch.uint8))
        for tensor in tensors:
            if tensor.numel():
                self._send(tensor.detach().contiguous())

    def _send(self, tensor: Tensor) -> None:
        dist.send(tensor, self._rank, self._group, tag=_TAG)


class _Receiving:
    """Receives messages from one rank, [Note: messages]."""

    def __init__(self, group: dist.ProcessGroup, rank: int, device: torch.device) -> None:
        self._group, self._rank, self._device = group, rank, device
        self._skeletons: dict[tuple[int, Op], Any] = {}

    def __call__(self, label: Action, _: None) -> Any:
        envelope = self._receive(torch.empty(_ENVELOPE, dtype=torch.int64)).tolist()
        stage, op, microbatch, size = envelope
        arrived = Action(stage, _OPS[op], microbatch)
        if arrived != label:
            raise PipelineError(f"{arrived} has arrived where {label} was expected")
        if size:
            data = self._receive(torch.empty(size, dtype=torch.uint8))
            self._skeletons[stage, _OPS[op]] = pickle.loads(bytes(data.numpy()))
        skeleton = self._skeletons[stage, _OPS[op]]
        tensors = []
        for slot in slots(skeleton):
            tensor = torch.empty(slot.shape, dtype=slot.dtype, device=self._device)
            if tensor.numel():
                self._receive(tensor)
            tensors.append(tensor.requires_grad_(slot.requires_grad))
        return put_together(skeleton, tensors)

    def _receive(self, tensor: Tensor) -> Tensor:
        dist.recv(tensor, self._rank, self._group, tag=_TAG)
        return tensor
