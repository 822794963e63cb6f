"""Forwards the output of a rank, and keeps the end of its stderr."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_TAIL_BYTES = 256 * 1024
_LINE_BYTES = 64 * 1024
_BLOCKED_S = 0.2
_TORCH_PREFIX = re.compile(rb"^\[rank\d+\]: ?", re.MULTILINE)
_TRACEBACK = b"Traceback (most recent call last):"


class Sink(Protocol):
    """Where the output of one stream of a rank goes."""

    def feed(self, data: bytes) -> None:
        """Takes bytes as they arrive."""

    def close(self) -> None:
        """The stream has ended."""


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where the output of one rank goes."""

    stdout: Sink | None
    """None: the rank writes to the stdout of this process itself."""
    stderr: Sink


class Tail:
    """The end of a rank's stderr, and the time when its last traceback began."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.traceback_s: float | None = None
        self._clock = clock
        self._data = bytearray()

    def feed(self, data: bytes) -> None:
        """Appends `data`. The first line of a traceback may arrive in pieces."""
        overlap = bytes(self._data[-len(_TRACEBACK) + 1 :])
        if _TRACEBACK in overlap + data:
            self.traceback_s = self._clock()
        self._data += data
        del self._data[:-_TAIL_BYTES]

    def text(self) -> str:
        """Returns the text, without the rank's number that torch prints before each line of a traceback."""
        return _TORCH_PREFIX.sub(b"", bytes(self._data)).decode(errors="replace")


class PassThrough:
    """Forwards bytes immediately, because progress bars use carriage returns and incomplete lines."""

    def __init__(self, sink: int, while_blocked: Callable[[], None] | None = None) -> None:
        self._sink = sink
        self._while_blocked = while_blocked

    def feed(self, data: bytes) -> None:
        """Writes `data` at once."""
        write_all(self._sink, data, self._while_blocked)

    def close(self) -> None:
        """Does nothing: no bytes are buffered."""


class Prefixed:
    """Forwards only complete lines, each with a prefix, so that lines of several ranks are not mixed.

    Of a line that was overwritten by carriage returns (a progress bar), only the last state is shown.
    """

    def __init__(self, sink: int, prefix: str, while_blocked: Callable[[], None] | None = None) -> None:
        self._sink = sink
        self._while_blocked = while_blocked
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
        """Writes the remaining incomplete line."""
        if self._partial:
            self._write([self._partial])
            self._partial = b""

    def _write(self, lines: list[bytes]) -> None:
        last_states = [line.rstrip(b"\r").rpartition(b"\r")[2] for line in lines]
        write_all(
            self._sink,
            b"".join(b"%s%s\n" % (self._prefix, _TORCH_PREFIX.sub(b"", line)) for line in last_states),
            self._while_blocked,
        )


class LogFile:
    """Writes the output of a rank to a file. An error (a full disk) ends the file with a warning, not the job."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path = path
        self._say = say
        self._file: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._streams = 2

    def feed(self, data: bytes) -> None:
        """Appends `data`."""
        if self._file is None:
            return
        try:
            write_all(self._file, data)
        except OSError as error:
            self._say(f"{self._path} is incomplete from here on: {error.strerror}")
            self._end()

    def close(self) -> None:
        """Closes the file when both streams of the rank have ended."""
        self._streams -= 1
        if self._streams == 0:
            self._end()

    def _end(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class Copies:
    """Passes the output on to several sinks."""

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = sinks

    def feed(self, data: bytes) -> None:
        """Passes `data` to each sink."""
        for sink in self._sinks:
            sink.feed(data)

    def close(self) -> None:
        """Closes each sink."""
        for sink in self._sinks:
            sink.close()


class Nowhere:
    """Drops the output."""

    def feed(self, data: bytes) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def write_all(sink: int, data: bytes, while_blocked: Callable[[], None] | None = None) -> None:
    """Writes all of `data`. A closed pipe (`ds run ... | head`) does not end the job.

    while_blocked: is called again and again while the sink accepts nothing (Ctrl-S in a terminal, `| less`).
    """
    view = memoryview(data)
    while view:
        while while_blocked is not None and not select.select([], [sink], [], _BLOCKED_S)[1]:
            while_blocked()
        try:
            view = view[os.write(sink, view[: select.PIPE_BUF] if while_blocked is not None else view) :]
        except BrokenPipeError:
            return
        except BlockingIOError:  # another program has made our terminal or pipe non-blocking
            select.select([], [sink], [])


def open_channel(like: int) -> tuple[int, int]:
    """Returns (read end, write end) for a rank's stream: of a pseudo-terminal if `like` is a terminal, else of a
    pipe.

    Programs draw progress bars and colours only on a terminal. Line ends are not translated; the outer terminal does
    that.
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
    """Sets the size of the terminal `target` to that of `source`; does nothing unless both are terminals."""
    try:
        size = fcntl.ioctl(source, termios.TIOCGWINSZ, struct.pack("4H", 0, 0, 0, 0))
        fcntl.ioctl(target, termios.TIOCSWINSZ, size)
    except OSError:
        return
