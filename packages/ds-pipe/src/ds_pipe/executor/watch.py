"""A thread that ends the waiting of another one when a rank has failed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ds_pipe.executor.failures import POLL_S, FailureBoard


@dataclass
class _Wait:
    """What a thread waits for."""

    end: Callable[[], None]
    """Makes it end with an error."""
    last_s: float
    """When it has waited for too long."""
    too_long: str


class Watch:
    """Looks at the board while a thread waits in calls that know nothing of it.

    [Note: waiting]
    Whoever computes also waits, since a thread that waits for it would have to get Python's lock from it and hand it
    over again for each message. A receive or a collective of gloo can't be asked whether it is done, and can't be left.
    So if it takes longer than a moment, this thread reads the board, and if a rank has failed it breaks the
    connection, with which what waits there ends.
    """

    def __init__(self, board: FailureBoard, name: str) -> None:
        """Starts with the first wait."""
        self._board, self._name = board, name
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._current: _Wait | None = None
        self.message: str | None = None
        """Why it has ended a wait."""

    @contextmanager
    def over(
        self, end: Callable[[], None], timeout_s: float = float("inf"), too_long: str = ""
    ) -> Iterator[None]:
        """Watches over what runs inside.

        Args:
            end: called by the watching thread to end it with an error.
            timeout_s: seconds after which it is ended.
            too_long: the message then.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"ds_pipe: {self._name}", daemon=True)
            self._thread.start()
        self._current = _Wait(end, time.monotonic() + timeout_s, too_long)
        try:
            yield
        finally:
            self._current = None

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(5.0)

    def _run(self) -> None:
        before: _Wait | None = None
        while not self._stopped.wait(POLL_S):
            wait = self._current
            if wait is not None and wait is before:
                message = self._board.read()
                if message is None and time.monotonic() > wait.last_s:
                    message = wait.too_long
                if message is not None and self._current is wait:
                    self.message = message
                    wait.end()
            before = wait
