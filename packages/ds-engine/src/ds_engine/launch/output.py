"""What becomes of a rank's output on its way to ours: where it goes, and what is remembered of it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import termios
import time
from collections.abc import Callable

_TAIL_BYTES = 256 * 1024
_LINE_BYTES = 64 * 1024
_TORCH_PREFIX = re.compile(rb"^\[rank\d+\]: ?", re.MULTILINE)
_TRACEBACK = b"Traceback (most recent call last):"


class Tail:
    """The last part of what a rank wrote to stderr, and when its last traceback began."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.traceback_s: float | None = None
        self._clock = clock
        self._data = bytearray()

    def feed(self, data: bytes) -> None:
        """Remembers `data`; a traceback's first line may come in pieces."""
        overlap = bytes(self._data[-len(_TRACEBACK) + 1 :])
        if _TRACEBACK in overlap + data:
            self.traceback_s = self._clock()
        self._data += data
        del self._data[:-_TAIL_BYTES]

    def text(self) -> str:
        """What is remembered, without the rank's number that torch puts before each line of a traceback."""
        return _TORCH_PREFIX.sub(b"", bytes(self._data)).decode(errors="replace")


class PassThrough:
    """Hands bytes on as they come: a progress bar lives on carriage returns and incomplete lines."""

    def __init__(self, sink: int) -> None:
        self._sink = sink

    def feed(self, data: bytes) -> None:
        """Writes `data` at once."""
        write_all(self._sink, data)

    def close(self) -> None:
        """Nothing is kept back."""


class Prefixed:
    """Hands on complete lines only, each with a prefix, so that ranks do not cut each other's lines.

    Of a line that was overwritten with carriage returns (a progress bar) only the last state is shown.
    """

    def __init__(self, sink: int, prefix: str) -> None:
        self._sink = sink
        self._prefix = prefix.encode()
        self._partial = b""

    def feed(self, data: bytes) -> None:
        """Writes the lines that `data` completes."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > _LINE_BYTES:
            lines.append(self._partial)
            self._partial = b""
        self._write(lines)

    def close(self) -> None:
        """Writes what was left without an end of line."""
        if self._partial:
            self._write([self._partial])
            self._partial = b""

    def _write(self, lines: list[bytes]) -> None:
        last_states = [line.rstrip(b"\r").rpartition(b"\r")[2] for line in lines]
        write_all(
            self._sink,
            b"".join(b"%s%s\n" % (self._prefix, _TORCH_PREFIX.sub(b"", line)) for line in last_states),
        )


def write_all(sink: int, data: bytes) -> None:
    """Writes all of `data`; a reader that went away (`ds run ... | head`) is no reason to end the job."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(sink, view) :]
        except BrokenPipeError:
            return
        except BlockingIOError:  # another program has made our terminal or pipe non-blocking
            select.select([], [sink], [])


def open_channel(like: int) -> tuple[int, int]:
    """A pair (read end, write end) for a rank's stream: a pseudo-terminal if `like` is a terminal, else a
    pipe.

    On a terminal a program draws progress bars and colours, which it would not do into a pipe. Line ends are
    left as the program wrote them: the outer terminal translates them.
    """
    if not os.isatty(like):
        return os.pipe()
    ours, theirs = pty.openpty()
    attributes = termios.tcgetattr(theirs)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(theirs, termios.TCSANOW, attributes)
    copy_window_size(like, ours)
    return ours, theirs


def copy_window_size(source: int, target: int) -> None:
    """Tells the terminal `target` the size of the terminal `source`; nothing if one of them is none."""
    try:
        size = fcntl.ioctl(source, termios.TIOCGWINSZ, struct.pack("4H", 0, 0, 0, 0))
        fcntl.ioctl(target, termios.TIOCSWINSZ, size)
    except OSError:
        return
