"""Tells when a backward pass ends."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch.autograd.variable import Variable


class BackwardWatch:
    """Calls its listeners once when the backward pass in which `arm` was called is over."""

    def __init__(self) -> None:
        self._listeners: list[weakref.WeakMethod[Callable[[], None]]] = []
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
        for pointer in self._listeners:
            listener = pointer()
            if listener is not None:
                listener()
