"""The protocols of ds_comm, in torch types only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Leaves(Protocol):
    """A group that this process can leave."""

    def leave(self) -> None:
        """Ends the waits of other ranks for this one."""


class Abort(Protocol):
    """A flag that ends waits. Whoever detects a failure raises it."""

    @property
    def raised(self) -> bool: ...

    def add(self, member: Leaves, /) -> None:
        """Registers a group that this process leaves when the flag is raised."""


class Exchange(Protocol):
    """One operation of a `Transport`. `wait_received` and `wait_sent` are the two halves of `wait`."""

    def reaches(self, rank: int, /) -> bool:
        """Whether tensors to and from `rank` are exchanged without messages."""

    def receive(self, rank: int, tensors: Sequence[Tensor], /) -> None:
        """Expects `tensors` from `rank`; `wait_received` fills them."""

    def send(self, rank: int, tensors: Sequence[Tensor], /) -> None:
        """Offers `tensors` to `rank`. They must not change before `wait_sent` returns."""

    def wait_received(self) -> None: ...
    def wait_sent(self) -> None: ...
    def wait(self) -> object: ...


class Transport(Protocol):
    """Exchanges tensors with ranks of one group, as ds_zero asks for it."""

    def exchange(self, tag: int, /) -> Exchange:
        """Returns a new operation. Operations with the same tag are matched in the order in which they start."""
