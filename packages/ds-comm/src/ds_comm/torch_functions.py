"""Puts a function around those of torch.distributed, which has no hook for its calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist

Function = Callable[..., Any]

_COMPARED = ("isend", "irecv")
"""Functions that torch compares with its own."""

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
    "isend",
    "irecv",
    "batch_isend_irecv",
    "barrier",
    "broadcast_object_list",
)
"""Names of collectives and messages."""


class _SameAs:
    """A function that is called instead of another one and is equal to it: torch compares the functions in a batch of
    messages with its own `isend` and `irecv`.
    """

    def __init__(self, function: Function, called: Function) -> None:
        functools.update_wrapper(self, function)
        self._function, self._called = function, called

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A batch tells by identity whether an operation sends, and so passes the peer of any other as `group_src`.
        if "group_src" in kwargs and self._function.__name__ == "isend":
            kwargs["group_dst"] = kwargs.pop("group_src")
        return self._called(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return self is other or bool(self._function == other)

    def __hash__(self) -> int:
        return hash(self._function)


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
                wrapped = wrap(name, function)
                self._before[name] = function, _SameAs(function, wrapped) if name in _COMPARED else wrapped
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
