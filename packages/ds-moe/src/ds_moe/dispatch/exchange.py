"""Messages between the ranks of an expert-parallel group.

[Note: overlap]
`start` begins an all-to-all and `finish` waits for it; both are nodes of autograd. What is computed between the two
in forward overlaps with the message. Backward runs nodes in the reverse order of their creation: the backward of
`finish` begins the message of gradients, that of what was computed between them follows, and the backward of `start`
waits. So backward overlaps as forward does.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_moe.dispatch.values import has_values
from ds_moe.interfaces import AllToAll, CountedWork, Work


@dataclass
class Traffic:
    """What one layer has sent since `clear`."""

    sent_bytes: int = 0
    """Bytes of rows that this rank has sent to other ranks, in forward and backward: as the all-to-all counts them
    if it does (`CountedWork`), otherwise those of the rows."""
    waiting_s: float = 0.0
    """Seconds for which this rank waited for rows, as the host sees them."""

    def clear(self) -> None:
        """Begins to count anew."""
        self.sent_bytes, self.waiting_s = 0, 0.0


def torch_all_to_all(*args: Any, **kwargs: Any) -> Any:
    """Calls `torch.distributed.all_to_all_single`, looked up now: a log of collectives replaces the function."""
    return dist.all_to_all_single(*args, **kwargs)


@dataclass(frozen=True)
class ExpertGroup:
    """The ranks that together hold the experts of a layer; rank r holds the r-th of equal runs."""

    group: dist.ProcessGroup | None
    """None for one rank, which holds all experts."""
    rank: int = 0
    size: int = 1
    all_to_all: AllToAll = field(default=torch_all_to_all, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertGroup:
        """Returns itself: a process group cannot be copied, and a copied layer talks to the same ranks."""
        return self

    def counts(self, sizes: list[int], device: torch.device) -> list[list[int]]:
        """Returns, for each rank, the numbers of rows that it sends to this rank's experts. Collective.

        Args:
            sizes: (E,), the numbers of rows that this rank sends to each expert.
        """
        if self.group is None:
            return [sizes]
        own = torch.tensor(sizes, device=device)
        if not has_values(own):  # all ranks are assumed to send alike
            local = len(sizes) // self.size
            return [sizes[self.rank * local : (self.rank + 1) * local]] * self.size
        received = torch.empty_like(own)
        dist.all_to_all_single(received, own, group=self.group)
        table: list[list[int]] = received.view(self.size, -1).tolist()
        return table


class _Message:
    """One exchange of rows and the exchange of their gradients; holds what waits for them."""

    def __init__(self, to: ExpertGroup, send: list[int], receive: list[int], traffic: Traffic) -> None:
        self._to, self.send, self.receive, self._traffic = to, send, receive, traffic
        self._work: Work | None = None
        self._sent: Tensor | None = None
        self._received: Tensor | None = None
        self._away_bytes = 0

    def begin(self, rows: Tensor, *, back: bool) -> None:
        """Starts to send rows, or, `back`, gradients of the rows that were received."""
        assert self._to.group is not None
        send, receive = (self.receive, self.send) if back else (self.send, self.receive)
        self._sent = rows = rows.contiguous()
        received = rows.new_empty(sum(receive), rows.shape[1])
        self._away_bytes = (sum(send) - send[self._to.rank]) * rows.shape[1] * rows.element_size()
        with torch.profiler.record_function("ds.moe.all_to_all"):
            self._work = self._to.all_to_all(received, rows, receive, send, self._to.group, True)
        self._received = received

    def wait(self) -> Tensor:
        """Waits for the rows, and returns them."""
        assert self._work is not None and self._received is not None
        begin = time.perf_counter()
        self._work.wait()
        self._traffic.waiting_s += time.perf_counter() - begin
        sent = self._work.sent_bytes if isinstance(self._work, CountedWork) else self._away_bytes
        self._traffic.sent_bytes += sent
        received = self._received
        self._work = self._sent = self._received = None
        return received


class Exchange:
    """The rows of one forward, on their way to the experts or back."""

    def __init__(self, to: ExpertGroup, send: list[int], receive: list[int], traffic: Traffic) -> None:
        """
        Args:
            send: the number of rows that this rank sends to each rank.
            receive: the number that each rank sends to this one.
        """
        self._message = _Message(to, send, receive, traffic) if to.group is not None else None

    def start(self, rows: Tensor) -> Tensor:
        """Begins the exchange. The result may only be passed to `finish`. [Note: overlap]"""
        if self._message is None:
            return rows
        return _Start.apply(rows, self._message)  # type: ignore[no-any-return,no-untyped-call]

    def finish(self, started: Tensor) -> Tensor:
        """Waits for the rows that this rank receives, in the order of ranks."""
        if self._message is None:
            return started
        return _Finish.apply(started, self._message)  # type: ignore[no-any-return,no-untyped-call]


class _Start(torch.autograd.Function):
    # The rows that arrive have another shape than those that leave, and autograd wants a gradient of the shape of
    # what it is for. So what passes between the two nodes is an empty tensor.
    @staticmethod
    def forward(ctx: Any, rows: Tensor, message: _Message) -> Tensor:
        ctx.message = message
        message.begin(rows, back=False)
        return rows.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.message.wait(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, started: Tensor, message: _Message) -> Tensor:
        ctx.message = message
        return message.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.message.begin(grad, back=True)
        return grad.new_empty(0), None
