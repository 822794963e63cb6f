"""The protocols of ds_comm, in torch types only."""

from __future__ import annotations

from typing import Protocol


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
