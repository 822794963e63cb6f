"""Exchanges in which every message carries its checksum.

[Note: checked messages]
TCP's checksum has 16 bits, and none covers the memory of a network card or the copies on the way: a flipped bit
arrives as a wrong gradient. Here the sender computes a checksum of each tensor when it is offered, and sends those of
all tensors for one rank as one further small tensor. The receiver compares before anything uses the values. A change of
one word of 32 bits is always found, any other change with a probability of 1 - 2^-64 (floating-point tensors; 1 - 2^-32
of other dtypes, whose checksum is CRC-32C). Memory that the sender changes too early is found as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm.interfaces import Abort, Exchange, Transport
from ds_core import kernels

Connect = Callable[[dist.ProcessGroup, torch.device, Abort], "Transport | None"]


class MessageError(RuntimeError):
    """A rank received other bits than were sent."""


def checksum(tensor: Tensor) -> int:
    """Returns the checksum of the bytes of a contiguous CPU tensor."""
    flat = tensor.detach().view(-1)
    if flat.is_floating_point() and flat.element_size() in (2, 4):
        [blocks] = kernels.checksums([flat])
        return int(blocks.sum())
    return kernels.crc32c(flat)


def checked(connect: Connect | None) -> Connect:
    """Returns a `connect` for `ds_zero.shard(comm=...)`: tensors go the same ways, and all of them are compared with
    their checksums on arrival.

    Args:
        connect: finds the ranks with which tensors are exchanged without messages; None: all ranks send messages.
    """

    def connect_checked(group: dist.ProcessGroup, device: torch.device, abort: Abort) -> Transport | None:
        if device.type != "cpu":
            raise ValueError(
                f"checked messages need tensors on the CPU, but those of this job are on {device}: there the backend "
                "adds on the way, and nobody sees the messages. Turn them off"
            )
        return CheckedTransport(group, None if connect is None else connect(group, device, abort))

    return connect_checked


class CheckedTransport:
    """`Transport` of ds_zero to all ranks of a group: [Note: checked messages]."""

    def __init__(self, group: dist.ProcessGroup, near: Transport | None) -> None:
        self._group, self._near = group, near

    def exchange(self, tag: int) -> CheckedExchange:
        """Returns a new operation with message tag `tag`."""
        near = None if self._near is None else self._near.exchange(tag)
        return CheckedExchange(_Messages(self._group, tag), near, dist.get_rank(self._group))


class CheckedExchange:
    """One operation of a `CheckedTransport`."""

    def __init__(self, messages: Exchange, near: Exchange | None, rank: int) -> None:
        self._messages, self._near, self._rank = messages, near, rank
        self._expected: list[tuple[int, Sequence[Tensor], Tensor]] = []
        self._known: dict[int, int] = {}
        """id of a tensor -> its checksum: an all-gather sends one tensor to all ranks."""
        self._kept: list[Any] = []

    def reaches(self, rank: int) -> bool:
        """Whether this operation exchanges the tensors to and from `rank`: those of all ranks."""
        return True

    def receive(self, rank: int, tensors: Sequence[Tensor]) -> None:
        """Expects `tensors` from `rank`, and their checksums."""
        if tensors:
            sums = torch.empty(len(tensors), dtype=torch.int64)
            self._way(rank).receive(rank, [*tensors, sums])
            self._expected.append((rank, tensors, sums))

    def send(self, rank: int, tensors: Sequence[Tensor]) -> None:
        """Offers `tensors` to `rank`, with their checksums. They must not change before `wait_sent` returns."""
        if tensors:
            sums = torch.tensor([self._checksum(tensor) for tensor in tensors], dtype=torch.int64)
            self._way(rank).send(rank, [*tensors, sums])

    def wait_received(self) -> None:
        """Waits for all expected tensors, and compares.

        Raises:
            MessageError: names the sender and the tensor.
        """
        self._messages.wait_received()
        if self._near is not None:
            self._near.wait_received()
        while self._expected:
            rank, tensors, sums = self._expected.pop(0)
            for number, (tensor, sent) in enumerate(zip(tensors, sums.tolist(), strict=True)):
                if checksum(tensor) != sent:
                    which = f"tensor {number + 1} of {len(tensors)} in the message"
                    raise MessageError(
                        f"rank {self._rank} of the group received other bits than rank {rank} sent: {which}, shape "
                        f"{tuple(tensor.shape)}, {tensor.dtype}. Memory, network card or link of one of the two "
                        "machines is faulty, or the sender changed the tensor too early. Resume from the last "
                        "checkpoint without them"
                    )

    def wait_sent(self) -> None:
        """Returns once no rank needs the offered tensors any more."""
        self._messages.wait_sent()
        if self._near is not None:
            self._near.wait_sent()
        self._kept.clear()

    def wait(self) -> None:
        self.wait_received()
        self.wait_sent()

    def _way(self, rank: int) -> Exchange:
        return self._near if self._near is not None and self._near.reaches(rank) else self._messages

    def _checksum(self, tensor: Tensor) -> int:
        if id(tensor) not in self._known:
            self._known[id(tensor)] = checksum(tensor)
            self._kept.append(tensor)  # its id stays its own
        return self._known[id(tensor)]


class _Messages:
    """`Exchange` by messages of torch.distributed."""

    def __init__(self, group: dist.ProcessGroup, tag: int) -> None:
        self._group, self._tag = group, tag
        self._incoming: list[Any] = []
        self._outgoing: list[Any] = []
        self._kept: list[Tensor] = []

    def reaches(self, rank: int) -> bool:
        """Whether tensors are exchanged without messages."""
        return False

    def receive(self, rank: int, tensors: Sequence[Tensor]) -> None:
        """Expects `tensors` from `rank`."""
        self._incoming += [self._group.recv([tensor], rank, self._tag) for tensor in tensors]

    def send(self, rank: int, tensors: Sequence[Tensor]) -> None:
        """Sends `tensors` to `rank`."""
        self._outgoing += [self._group.send([tensor], rank, self._tag) for tensor in tensors]
        self._kept += tensors

    def wait_received(self) -> None:
        """Waits for all expected tensors."""
        while self._incoming:
            self._incoming.pop(0).wait()

    def wait_sent(self) -> None:
        """Returns once all tensors are sent."""
        while self._outgoing:
            self._outgoing.pop(0).wait()
        self._kept.clear()

    def wait(self) -> None:
        self.wait_received()
        self.wait_sent()
