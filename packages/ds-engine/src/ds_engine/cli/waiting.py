"""A sign of life on the terminal while something takes long."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

DELAY_S = 2.0
"""What is over by then shows nothing."""


@contextlib.contextmanager
def waiting(text: str, *, delay_s: float = DELAY_S) -> Iterator[Callable[[str], None]]:
    """A spinner with `text` on stderr, from `delay_s` on; nothing where stderr is no terminal.

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
