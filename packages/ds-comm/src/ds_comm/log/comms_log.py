"""The record of the collectives of one rank."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Protocol

from ds_comm.exchange.wire import bus_bytes
from ds_comm.log.totals import Key, Total


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """What is recorded. The names are those of DeepSpeed's section `comms_logger`."""

    verbose: bool = False
    """Writes a line for each call when it has ended."""
    prof_all: bool = True
    """Records all operations, not only those in `prof_ops`."""
    prof_ops: Sequence[str] = ()
    """Names of the operations that are recorded if `prof_all` is false."""
    debug: bool = False
    """Distinguishes calls by the function that made them."""


class End(Protocol):
    """Ends the record of a call."""

    def __call__(self, sent_bytes: float | None = None, *, seen: bool = True) -> None:
        """Args:
        sent_bytes: what this rank has sent; None: what the best algorithm sends.
        seen: whether the call ends now; False: its end is not observed, so it has no time.
        """


class CommsLog:
    """Counts and times collectives. Whoever starts them calls `begin`, and what `begin` returns when they have ended.

    Nothing is synchronised for it: a time includes the wait for ranks that arrive later, and that of an asynchronous
    operation ends when its end is seen. Calls may come from several threads.
    """

    def __init__(
        self,
        options: LogOptions = LogOptions(),
        *,
        write: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Args:
        write: receives the lines of `LogOptions.verbose`; None: they are not written.
        clock: returns seconds.
        """
        self.options = options
        self._write, self._clock = write, clock
        self._wanted = None if options.prof_all else frozenset(options.prof_ops)
        self._totals: dict[Key, Total] = {}
        self._lock = threading.Lock()
        self._thread = threading.local()

    def begin(self, operation: str, num_bytes: int, ranks: int) -> End | None:
        """Counts a call. Returns a function to call once at its end; None: the call is not recorded, because its
        operation is not wanted or because it is a part of another recorded call.

        Args:
            operation: name of the collective, such as "all_reduce".
            num_bytes: of its largest tensor on this rank.
            ranks: number of ranks that take part.
        """
        if getattr(self._thread, "inside", 0) or (self._wanted is not None and operation not in self._wanted):
            return None
        caller = _caller(sys._getframe(1)) if self.options.debug else ""
        key = Key(operation, num_bytes, ranks, caller)
        best = bus_bytes(operation, num_bytes, ranks)
        with self._lock:
            total = self._totals.setdefault(key, Total())
            total.count += 1
        begun = self._clock()

        def end(sent_bytes: float | None = None, *, seen: bool = True) -> None:
            seconds = self._clock() - begun
            with self._lock:
                total.sent_bytes += best if sent_bytes is None else sent_bytes
                if not seen:
                    return
                total.add_time(seconds)
            if self.options.verbose and self._write is not None:
                self._write(_line(key, seconds, best))

        return end

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Context manager around the work of a recorded call: calls of this thread in it are parts of that one."""
        self._thread.inside = getattr(self._thread, "inside", 0) + 1
        try:
            yield
        finally:
            self._thread.inside -= 1

    def totals(self) -> Mapping[Key, Total]:
        """Returns a copy of what was recorded on this rank."""
        with self._lock:
            return {k: replace(t, recent_s=t.recent_s.copy()) for k, t in self._totals.items()}

    def reset(self) -> None:
        """Forgets what was recorded, for example at the end of an epoch."""
        with self._lock:
            self._totals.clear()


def _line(key: Key, seconds: float, best: float) -> str:
    seconds = max(seconds, 1e-9)
    caller = f" | called by {key.caller}" if key.caller else ""
    return (
        f"comm op: {key.operation} | time: {1e3 * seconds:.3f} ms | size: {key.num_bytes} bytes | ranks: {key.ranks} | "
        f"algbw: {key.num_bytes / seconds * 8e-9:.2f} Gb/s | busbw: {best / seconds * 8e-9:.2f} Gb/s{caller}"
    )


_OWN = (
    "ds_comm.log",
    "ds_comm.stalls",
    "ds_comm.torch_functions",
    "torch.distributed",
    "contextlib",
    "ds_zero.comm.",
    "ds_comm.same_host",
)
"""Modules between a call and this one."""


def _caller(frame: FrameType | None) -> str:
    """Returns the innermost function that is not of the modules that only pass calls on."""
    while frame is not None and str(frame.f_globals.get("__name__", "")).startswith(_OWN):
        frame = frame.f_back
    if frame is None:
        return ""
    name = str(frame.f_globals.get("__name__", "?"))
    return f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
