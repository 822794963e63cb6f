"""Started operations: what waiting for them means, and for several of them at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ds_zero.interfaces import Work


class Done:
    """A work that is already finished."""

    def wait(self) -> None:
        return None


def wait_received(work: Work) -> None:
    """Wait until what comes is there. `wait_sent` must follow before what was sent may change or go."""
    getattr(work, "wait_received", work.wait)()


def wait_sent(work: Work) -> None:
    """After `wait_received`: wait until nobody needs what was sent any more.

    [Note: received and sent]
    A rank that reads peer memory copies when it needs the values, so what was sent has to stay until the slowest rank
    has come as far as this one. A rank that waits for that at once moves in step with all others, and the delays of all
    ranks add up. So the two waits are apart: the second comes one bucket or one unit later, when it is usually over.
    """
    late = getattr(work, "wait_sent", None)
    if late is not None:
        late()


class Then:
    """Several works, and what has to happen once after what comes has come."""

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
