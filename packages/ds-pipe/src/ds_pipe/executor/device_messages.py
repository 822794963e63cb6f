"""Messages between two ranks whose tensors may be on an accelerator.

NCCL runs the messages between two ranks one after the other, so a receive that waits would block the sends behind it:
tensors are received only when their envelope has arrived. So that this overlaps with computation, a thread for each
rank takes messages, and one waits until sent tensors are gone.
"""

from __future__ import annotations

import pickle
import queue
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_pipe.actions import Action, Op
from ds_pipe.errors import PipelineError
from ds_pipe.executor.host_messages import FIRST_TAG, OPS, Running
from ds_pipe.executor.values import Slot, put_together, slots, take_apart

_ENVELOPE = 4  # stage, operation, micro-batch, bytes of the header


class Worker:
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


def wait_until_gone(label: Action, running: Running) -> None:
    """Waits until tensors have been sent, and drops them."""
    while running:
        running[0][1].wait()
        del running[0]


class Sending:
    """Starts to send messages to one rank."""

    def __init__(self, group: dist.ProcessGroup, rank: int) -> None:
        """To a global rank."""
        self._group, self._rank = group, rank
        self._headers: dict[tuple[int, Op], bytes] = {}

    def __call__(self, label: Action, value: Any) -> Running:
        """Starts to send a value."""
        skeleton, tensors = take_apart(value)
        header, channel = pickle.dumps(skeleton), (label.stage, label.op)
        changed = header != self._headers.get(channel)
        self._headers[channel] = header
        numbers = [label.stage, OPS.index(label.op), label.microbatch, len(header) if changed else 0]
        parts = [torch.tensor(numbers)]
        if changed:
            parts.append(torch.frombuffer(bytearray(header), dtype=torch.uint8))
        parts += [tensor.detach().contiguous() for tensor in tensors]
        running: Running = []
        for part in parts:
            if part.numel():
                work = dist.isend(part, self._rank, self._group, tag=FIRST_TAG)
                assert work is not None
                running.append((part, work))
        return running


class Receiving:
    """Receives messages from one rank."""

    def __init__(self, group: dist.ProcessGroup, rank: int, device: torch.device) -> None:
        """From a global rank."""
        self._group, self._rank, self._device = group, rank, device
        self._skeletons: dict[tuple[int, Op], Any] = defaultdict(lambda: None)

    def __call__(self, label: Action) -> Any:
        """Waits for a message, and returns its value."""
        stage, op, microbatch, size = self._received(torch.empty(_ENVELOPE, dtype=torch.int64)).tolist()
        arrived = Action(stage, OPS[op], microbatch)
        if arrived != label:
            raise PipelineError(f"{arrived} has arrived where {label} was expected")
        channel = label.stage, label.op
        if size:
            header = bytes(self._received(torch.empty(size, dtype=torch.uint8)).numpy())
            self._skeletons[channel] = pickle.loads(header)
        skeleton = self._skeletons[channel]
        tensors = [self._of(slot) for slot in slots(skeleton)]
        return put_together(skeleton, tensors)

    def _of(self, slot: Slot) -> Tensor:
        device = torch.device("cpu") if slot.on_host else self._device
        tensor = self._received(torch.empty(slot.shape, dtype=slot.dtype, device=device))
        return tensor.requires_grad_(slot.requires_grad)

    def _received(self, tensor: Tensor) -> Tensor:
        if tensor.numel():
            dist.recv(tensor, self._rank, self._group, tag=FIRST_TAG)
        return tensor
