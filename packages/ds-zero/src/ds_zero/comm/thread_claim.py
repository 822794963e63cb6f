"""One process group is used by one thread at a time.

Two threads that send over one group at once send in an order that differs between ranks, so that messages are taken for
each other: gloo ends the process, and other backends wait for ever or give wrong values.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch.distributed as dist

from ds_zero import _registry
from ds_zero.comm.ranks import Ranks, SimulatedGroup


class ThreadClaim:
    """One group's: while it lives, other threads are refused."""

    def __init__(self) -> None:
        self.thread = threading.current_thread()


class GroupClaims:
    """Claims the groups of `ranks` for this thread, until `remove`."""

    def __init__(self, ranks: Iterable[Ranks], what: str) -> None:
        """
        Args:
            what: the call, for the error.

        Raises:
            RuntimeError: a living thread has claimed one of the groups.
        """
        groups = {id(axis.group): axis.group for one in ranks for axis in one.axes}
        self._held = [
            _claim(group, what)
            for group in groups.values()
            if isinstance(group, dist.ProcessGroup) and not isinstance(group, SimulatedGroup)
        ]

    def remove(self) -> None:
        self._held.clear()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self.remove()


def _claim(group: dist.ProcessGroup, what: str) -> ThreadClaim:
    me, held = threading.current_thread(), _registry.claim_of(group)
    if held is not None and held.thread is not me and held.thread.is_alive():
        other = held.thread.name
        del held  # or whoever keeps the exception would hold the claim
        raise RuntimeError(
            f"{what} in thread {me.name!r}: thread {other!r} trains a model over the same process group, "
            "and messages of the two would be taken for each other's. Train both in one thread, or give each a group "
            "of its own: ds_zero.shard(..., mesh=torch.distributed.new_group())"
        )
    if held is None or held.thread is not me:
        held = ThreadClaim()
        _registry.put_claim(group, held)
    return held
