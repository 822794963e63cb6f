"""A small process that ends what ranks have started when the launcher is killed by kill -9.

The kernel then kills the ranks themselves (`PR_SET_PDEATHSIG`), but not their children, such as the workers of a data
loader. Run as a program, this file reads from stdin which process groups exist, and kills them at its end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys


class Guardian:
    """Kills the process groups it has been given when this process is gone."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
            bufsize=0,
        )

    def add(self, group: int) -> None:
        """Guards a process group."""
        self._send(f"+{group}\n")

    def remove(self, group: int) -> None:
        """Guards a process group no longer. Called before its leader is waited for: then its number may be reused."""
        self._send(f"-{group}\n")

    def close(self) -> None:
        """Ends the guardian; nothing it was given may be left."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()

    def _send(self, line: str) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # somebody has killed it; the job goes on without
                self._process.stdin.write(line.encode())


def _guard() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin:
        group = int(line[1:])
        if line[0] == "+":
            groups.add(group)
        else:
            groups.discard(group)
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    _guard()
