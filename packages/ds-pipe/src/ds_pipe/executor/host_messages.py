"""Messages between two ranks whose tensors are in the memory of the host.

[Note: messages]
Every stage and operation has a channel of its own, that is, tags of its own, so that messages of different channels do
not wait for each other. A message begins with an envelope of four numbers: stage, operation, micro-batch, bytes of the
header. The header is the pickled skeleton of the value, with shapes and dtypes; it is left out if it is that of the
previous message in the channel.

gloo transfers a message only once its receive has started. When two messages in a row had the same header, both sides
expect it again: the receiver starts to receive envelope and tensors at once, before it needs them, and values of up to
`JOINED_BYTES` are one message, with their envelope. A sender whose header differs nevertheless first sends a message of
the old form, of which only the envelope counts; header and tensors follow with another tag. So shapes may vary without
an agreement, and in most steps a value costs one send and one receive, which the thread that computes starts itself.

In a channel only one receive runs at a time, since the form of the next message depends on this one.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_pipe.actions import Action, Op
from ds_pipe.errors import PipelineError
from ds_pipe.executor.values import Slot, put_together, slots, take_apart

FIRST_TAG = 7411
"""Tags from here on are used."""
OPS = (Op.RECV_FORWARD, Op.RECV_BACKWARD)
JOINED_BYTES = 256 * 1024
"""Values of at most as many bytes are copied behind their envelope. Larger ones are sent as they are."""

_ALIGNMENT = 64
_ENVELOPE = 4  # stage, operation, micro-batch, bytes of the header

Running = list[tuple[Tensor, dist.Work]]
"""Tensors that are being sent. They must live until they are gone."""


def tags(label: Action) -> tuple[int, int]:
    """The tag of a channel, and that of what follows a message of the old form."""
    tag = FIRST_TAG + 2 * (len(OPS) * label.stage + OPS.index(label.op))
    return tag, tag + 1


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


class _Form:
    """Where the tensors of a value are in its message."""

    def __init__(self, skeleton: Any) -> None:
        self.slots = slots(skeleton)
        self.offsets, end = [], _ALIGNMENT
        for slot in self.slots:
            self.offsets.append(end)
            end += _padded(torch.Size(slot.shape).numel() * slot.dtype.itemsize)
        self.is_joined = end <= JOINED_BYTES
        self.num_bytes = end if self.is_joined else _ALIGNMENT

    def parts(self, buffer: Tensor) -> list[Tensor]:
        """The tensors in a buffer; not views, which would share one count of changes in place."""
        storage = buffer.untyped_storage()
        return [
            # Contiguous without strides, which torch's stub does not know.
            torch.empty(0, dtype=slot.dtype).set_(  # type: ignore[call-overload]
                storage, offset // slot.dtype.itemsize, slot.shape
            )
            for slot, offset in zip(self.slots, self.offsets, strict=True)
        ]

    def separate(self) -> list[Tensor]:
        """Room for the tensors that are messages of their own."""
        return [torch.empty(slot.shape, dtype=slot.dtype) for slot in self.slots]


@dataclass
class _Known:
    """What both sides know of the last message in a channel."""

    header: bytes = b""
    skeleton: Any = None
    form: _Form | None = None
    repeats: int = 0
    """How many messages in a row have had this header."""

    def note(self, header: bytes, skeleton: Any) -> None:
        """After a message."""
        if header == self.header:
            self.repeats += 1
            return
        self.header, self.skeleton, self.form, self.repeats = header, skeleton, _Form(skeleton), 1

    def expected(self) -> _Form | None:
        """The form in which the receive starts before anything is known of the message; None: only its envelope."""
        return self.form if self.repeats >= 2 else None

    def header_of(self, skeleton: Any) -> bytes:
        """The header of a value. Pickling takes longer than comparing, which is safe for tensors only."""
        if _is_plain(skeleton) and _is_plain(self.skeleton) and skeleton == self.skeleton:
            return self.header
        return pickle.dumps(skeleton)


def _is_plain(skeleton: Any) -> bool:
    if type(skeleton) in (tuple, list):
        return all(type(part) is Slot for part in skeleton)
    return type(skeleton) is Slot


class Outgoing:
    """The sending side of a channel."""

    def __init__(self, group: dist.ProcessGroup, rank: int, label: Action) -> None:
        """To a global rank."""
        self._group, self._rank = group, rank
        self._tag, self._after = tags(label)
        self._known = _Known()

    def send(self, label: Action, value: Any) -> Running:
        """Starts to send a value."""
        skeleton, tensors = take_apart(value)
        known = self._known
        header, early = known.header_of(skeleton), known.expected()
        changed = header != known.header
        running: Running = []
        self._envelope(running, label, early, len(header) if changed else 0, [] if changed else tensors)
        if changed:
            if early is not None and not early.is_joined:
                for room in early.separate():
                    self._start(running, room, self._tag)
            self._start(running, torch.frombuffer(bytearray(header), dtype=torch.uint8), self._after)
        if changed or early is None:
            for tensor in tensors:
                self._start(running, _on_host(tensor), self._after)
        elif not early.is_joined:
            for tensor in tensors:
                self._start(running, _on_host(tensor), self._tag)
        known.note(header, skeleton)
        return running

    def _envelope(
        self, running: Running, label: Action, early: _Form | None, size: int, tensors: Sequence[Tensor]
    ) -> None:
        buffer = torch.empty(_ALIGNMENT if early is None else early.num_bytes, dtype=torch.uint8)
        numbers = [label.stage, OPS.index(label.op), label.microbatch, size]
        buffer[: 8 * _ENVELOPE].view(torch.int64).copy_(torch.tensor(numbers))
        if early is not None and early.is_joined and tensors:
            for part, tensor in zip(early.parts(buffer), tensors, strict=True):
                part.copy_(tensor.detach())
        self._start(running, buffer, self._tag)

    def _start(self, running: Running, tensor: Tensor, tag: int) -> None:
        if tensor.numel():
            work = dist.isend(tensor, self._rank, self._group, tag=tag)
            assert work is not None
            running.append((tensor, work))


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


class Incoming:
    """The receiving side of a channel."""

    def __init__(self, group: dist.ProcessGroup, rank: int, label: Action) -> None:
        """From a global rank."""
        self._group, self._rank = group, rank
        self._tag, self._after = tags(label)
        self._known = _Known()
        self._expected: deque[Action] = deque()
        self._posted: tuple[Tensor, list[Tensor], list[dist.Work]] | None = None

    def expect(self, label: Action) -> None:
        """Starts the receive, if none of this channel runs."""
        self._expected.append(label)
        if self._posted is None:
            self._post()

    def take(self) -> tuple[Action, Any]:
        """Waits for the next expected message; returns its label and value."""
        assert self._posted is not None
        buffer, separate, works = self._posted
        early, known, label = self._known.expected(), self._known, self._expected.popleft()
        for work in works:
            work.wait()
        stage, op, microbatch, size = buffer[: 8 * _ENVELOPE].view(torch.int64).tolist()
        arrived = Action(stage, OPS[op], microbatch)
        if arrived != label:
            raise PipelineError(f"{arrived} has arrived where {label} was expected")
        header, skeleton = known.header, known.skeleton
        if size:
            header = bytes(self._now(torch.empty(size, dtype=torch.uint8)).numpy())
            skeleton = pickle.loads(header)
        known.note(header, skeleton)
        assert known.form is not None
        if size or early is None:
            tensors = [self._now(room) for room in known.form.separate()]
        else:
            tensors = early.parts(buffer) if early.is_joined else separate
        self._posted = None
        if self._expected:
            self._post()
        for slot, tensor in zip(known.form.slots, tensors, strict=True):
            if slot.requires_grad:
                tensor.requires_grad_(True)
        return label, put_together(skeleton, tensors)

    def _post(self) -> None:
        early = self._known.expected()
        buffer = torch.empty(_ALIGNMENT if early is None else early.num_bytes, dtype=torch.uint8)
        separate = early.separate() if early is not None and not early.is_joined else []
        works = [
            dist.irecv(t, self._rank, self._group, tag=self._tag) for t in (buffer, *separate) if t.numel()
        ]
        self._posted = buffer, separate, [work for work in works if work is not None]

    def _now(self, tensor: Tensor) -> Tensor:
        """Receives what follows a message."""
        if tensor.numel():
            dist.recv(tensor, self._rank, self._group, tag=self._after)
        return tensor
