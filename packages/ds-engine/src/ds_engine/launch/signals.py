"""Signals that a launcher or an agent receives while it waits in its selector."""

from __future__ import annotations

import os
import selectors
import signal
from types import FrameType, TracebackType
from typing import Any

FORWARDED = (signal.SIGUSR1, signal.SIGUSR2)
"""Batch systems send these before they end a job."""
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The ranks end after one of these."""


class CaughtSignals:
    """While entered, collects the signals of this process; each wakes the selector, and so does the end of a child.

    A signal that is ignored already (nohup, a background job of a shell) stays ignored, also in the ranks.
    """

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        self._received: list[signal.Signals] = []
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> CaughtSignals:
        self._wake, self._woken = os.pipe()
        for end in (self._wake, self._woken):
            os.set_blocking(end, False)
        caught = [signal.SIGCHLD, signal.SIGWINCH]
        caught += [number for number in (*FORWARDED, *STOPPING) if signal.getsignal(number) != signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, self._note) for number in caught}
        self._previous_fd = signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        self._selector.register(self._wake, selectors.EVENT_READ, lambda stream: os.read(stream, 4096))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._selector.unregister(self._wake)
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._wake)
        os.close(self._woken)

    def take(self) -> list[signal.Signals]:
        """Returns the signals since the last call."""
        received, self._received = self._received, []
        return received

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received.append(signal.Signals(number))
