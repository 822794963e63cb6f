"""Waiting for operations that have been started."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ds_zero.interfaces import Work


class Done:
    """An operation that has already finished."""

    def wait(self) -> None:
        return None


def wait_received(work: Work) -> None:
    """Waits until everything has been received. The tensors that this rank sends must not be changed or freed before
    `wait_sent` has returned.
    """
    getattr(work, "wait_received", work.wait)()


def wait_sent(work: Work) -> None:
    """Waits until no other rank needs the tensors that this rank sends. Called after `wait_received`.

    [Note: received and sent]
    With a `Transport` that reads the memory of other ranks, the receiver copies a tensor when it needs the values. So
    the tensor must stay unchanged until the slowest rank has reached this point. If each rank waited for that at once,
    all ranks would run in lockstep, and the delays of all ranks would add up. So there are two waits, and the second
    one is called one bucket or one unit later, when it usually returns at once.
    """
    late = getattr(work, "wait_sent", None)
    if late is not None:
        late()


class Then:
    """Several operations, and a function that is called once after everything has been received."""

    def __init__(self, works: Sequence[Work], then: Callable[[], None]) -> None:
        self._works, self._then, self._arrived = list(works), then, False

    def wait_received(self) -> None:
        if self._arrived:
            return
        for work in self._works:
            wait_received(work)
        self._arrived = True
        self._then()

    def wait_sent(self) -> None:
        works, self._works = self._works, []
        for work in works:
            wait_sent(work)

    def wait(self) -> None:
        self.wait_received()
        self.wait_sent()
