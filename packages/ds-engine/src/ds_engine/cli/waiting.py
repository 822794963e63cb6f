"""A spinner on the terminal during long operations."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

DELAY_S = 2.0
"""Operations that end earlier show no spinner."""


@contextlib.contextmanager
def waiting(text: str, *, delay_s: float = DELAY_S) -> Iterator[Callable[[str], None]]:
    """Shows a spinner with `text` on stderr after `delay_s` seconds, if stderr is a terminal.

    Yields:
        A function that replaces the text.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    status = Console(stderr=True).status(text)
    timer = threading.Timer(delay_s, status.start)
    timer.daemon = True
    if delay_s > 0:
        timer.start()
    else:
        status.start()
    try:
        yield status.update
    finally:
        timer.cancel()
        if delay_s > 0:
            timer.join()
        status.stop()
