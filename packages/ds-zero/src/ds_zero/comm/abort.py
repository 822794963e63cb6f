"""The flag that ends waits for other ranks."""

from __future__ import annotations

import weakref

from ds_zero.interfaces import Leaves


class AbortFlag:
    """When it is raised, ends all waits of this process for peers, and all waits of peers for this process."""

    def __init__(self) -> None:
        self.raised = False
        self._members: weakref.WeakSet[Leaves] = weakref.WeakSet()

    def add(self, member: Leaves, /) -> None:
        """Adds a group that this process leaves when the flag is raised."""
        self._members.add(member)

    def set(self) -> None:
        """Raises the flag."""
        self.raised = True
        for member in list(self._members):
            member.leave()
