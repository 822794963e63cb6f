"""Puts a function around those of torch.distributed, which has no hook for its calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist

Function = Callable[..., Any]

OPERATIONS = (
    "all_reduce",
    "broadcast",
    "reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_gather_object",
    "gather",
    "scatter",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
    "all_to_all",
    "all_to_all_single",
    "send",
    "recv",
    "batch_isend_irecv",
    "barrier",
    "broadcast_object_list",
)
"""Names of collectives and messages. `isend` and `irecv` are not among them: torch compares the functions in a batch
with its own.
"""


class WrappedFunctions:
    """While it exists, calls of these functions go through others. Several may exist at the same time. Code that has
    imported a function by its name before is not seen.
    """

    def __init__(self, names: Iterable[str], wrap: Callable[[str, Function], Function]) -> None:
        """Args:
        names: of functions; those that this version of torch lacks are left out.
        wrap: from the name of a function and the function to the one that is called instead.
        """
        self._before: dict[str, tuple[Function, Function]] = {}
        """Name -> the function that was there, and its replacement."""
        for name in names:
            function = getattr(dist, name, None)
            if function is not None:
                self._before[name] = function, wrap(name, function)
                setattr(dist, name, self._before[name][1])

    def close(self) -> None:
        """Puts the functions back unless somebody has wrapped them since. Safe to call twice."""
        for name, (function, wrapped) in self._before.items():
            if getattr(dist, name) is wrapped:
                setattr(dist, name, function)
        self._before = {}


def group_among(arguments: Iterable[Any]) -> Any:
    """Returns the group among the arguments of a call: a process group, `GroupMember.NON_GROUP_MEMBER`, or None for all
    ranks.
    """
    outside = dist.GroupMember.NON_GROUP_MEMBER
    return next((x for x in arguments if isinstance(x, dist.ProcessGroup) or x is outside), None)
