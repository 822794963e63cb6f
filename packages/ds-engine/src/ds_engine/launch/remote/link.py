"""One end of the connection between the launcher and an agent: frames in both directions, and heartbeats."""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ds_engine.launch.remote.frames import Frame, FrameError, FrameReader

_READ_BYTES = 1 << 18
_HEARTBEATS_PER_TIMEOUT = 6


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """How often each end sends a heartbeat, and when the other end is considered lost."""

    timeout_s: float = 60.0
    """Seconds without any byte after which the other end is lost."""

    @property
    def interval_s(self) -> float:
        """Seconds between heartbeats."""
        return min(5.0, self.timeout_s / _HEARTBEATS_PER_TIMEOUT)


class Link:
    """Sends and receives frames without blocking, and sends a heartbeat at regular intervals.

    An end that hears nothing for `pulse.timeout_s` closes the link: a machine that vanished sends no reset.
    """

    def __init__(
        self,
        receive: int,
        send: int,
        selector: selectors.BaseSelector,
        on_frame: Callable[[Frame], None],
        *,
        pulse: Pulse,
        magic: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.closed: str | None = None
        """Why nothing more can be received; None while the link is open."""
        self.status: Callable[[], dict[str, Any]] = dict
        """Fields of the heartbeats that this end sends."""
        self.pulse = pulse
        self._receive, self._send = receive, send
        self._clock = clock
        self._selector = selector
        self._on_frame = on_frame
        self._reader = FrameReader(magic=magic)
        self._outgoing = bytearray()
        self._broken = False
        self._waits_to_write = False
        self._heard_s = self._sent_s = self._clock()
        for stream in (receive, send):
            os.set_blocking(stream, False)
        selector.register(receive, selectors.EVENT_READ, self._read)

    @property
    def preamble(self) -> str:
        """What arrived before the first frame."""
        return self._reader.preamble.decode(errors="replace")

    @property
    def backlog_bytes(self) -> int:
        """Bytes that wait to be sent."""
        return len(self._outgoing)

    @property
    def silent_s(self) -> float:
        """Seconds since the last byte arrived."""
        return self._clock() - self._heard_s

    @property
    def due_s(self) -> float:
        """When `beat` must be called next (monotonic clock)."""
        if self.closed is not None:
            return float("inf")
        lost_s = self._heard_s + self.pulse.timeout_s
        return lost_s if self._outgoing else min(self._sent_s + self.pulse.interval_s, lost_s)

    def send(self, kind: str, body: bytes = b"", /, **fields: Any) -> None:
        """Queues a frame, and sends as much as the connection accepts now."""
        if self._broken or self.closed is not None:
            return
        self._outgoing += Frame(kind, fields, body).encoded()
        self._sent_s = self._clock()
        self._flush(self._send)

    def beat(self) -> None:
        """Sends a heartbeat if one is due, and closes the link if the other end has been silent for too long."""
        if self.closed is not None:
            return
        if self.silent_s >= self.pulse.timeout_s / 2:
            self._read(self._receive)  # after a long pause of this process, bytes may have been waiting
        if self.closed is None and self.silent_s >= self.pulse.timeout_s:
            self.close(f"no heartbeat for {self.pulse.timeout_s:g} s")
        self.keep_alive()

    def keep_alive(self) -> None:
        """Sends what waits, and a heartbeat if one is due. Receives nothing."""
        if self.closed is None and self._outgoing:
            self._flush(self._send)
        if self._clock() - self._sent_s >= self.pulse.interval_s and not self._outgoing:
            self.send("heartbeat", **self.status())

    def close(self, reason: str) -> None:
        """Stops receiving and sending; closes both descriptors."""
        if self.closed is not None:
            return
        self.closed = reason
        self._selector.unregister(self._receive)
        if self._waits_to_write:
            self._selector.unregister(self._send)
            self._waits_to_write = False
        for stream in {self._receive, self._send}:
            os.close(stream)

    def _read(self, stream: int) -> None:
        try:
            data = os.read(stream, _READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self.close(str(error))
            return
        if not data:
            self.close("the connection ended")
            return
        self._heard_s = self._clock()
        try:
            for frame in self._reader.feed(data):
                self._on_frame(frame)
        except FrameError as error:
            self.close(f"unexpected bytes: {error}")

    def _flush(self, stream: int) -> None:
        try:
            while self._outgoing and not self._broken:
                del self._outgoing[: os.write(stream, self._outgoing[:_READ_BYTES])]
        except BlockingIOError:
            pass
        except OSError:  # the other end is gone; reading shows it as well, after what it has sent before
            self._broken = True
            self._outgoing.clear()
        waits = bool(self._outgoing)
        if waits != self._waits_to_write:
            self._waits_to_write = waits
            if waits:
                self._selector.register(stream, selectors.EVENT_WRITE, self._flush)
            else:
                self._selector.unregister(stream)
