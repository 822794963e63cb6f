"""Tells when a backward pass ends."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch.autograd.variable import Variable


class BackwardWatch:
    """Calls its listeners once when the backward pass in which `arm` was called is over."""

    def __init__(self) -> None:
        self._listeners: list[weakref.WeakMethod[Callable[[], None]]] = []
        self._undoers: list[weakref.WeakMethod[Callable[[], None]]] = []
        self._armed = False

    @property
    def armed(self) -> bool:
        """Whether a backward is running of which hooks have already seen something."""
        return self._armed

    def at_end(self, listener: Callable[[], None]) -> None:
        """Call the bound method `listener` at the end; listeners run in the order in which they were added
        and are not kept alive.
        """
        self._listeners.append(weakref.WeakMethod(listener))

    def at_abort(self, listener: Callable[[], None]) -> None:
        """Call the bound method `listener` when it turns out that a backward was left by an exception."""
        self._undoers.append(weakref.WeakMethod(listener))

    def check_abort(self) -> None:
        """Call where no backward of this model can be running, as before a forward that is no
        recomputation.
        """
        if self._armed and torch._C._current_graph_task_id() == -1:
            self._armed = False
            _call(self._undoers)

    def arm(self) -> None:
        """Only valid inside a backward pass."""
        if self._armed:
            return
        self._armed = True
        me = weakref.ref(self)

        def fire() -> None:
            watch = me()
            if watch is not None:
                watch._fire()

        Variable._execution_engine.queue_callback(fire)

    def _fire(self) -> None:
        self._armed = False
        _call(self._listeners)


def _call(listeners: list[weakref.WeakMethod[Callable[[], None]]]) -> None:
    for pointer in listeners:
        listener = pointer()
        if listener is not None:
            listener()
