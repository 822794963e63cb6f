"""A training that is run as a trial: with a time limit, and its output in a file."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

OUT_OF_MEMORY = "out of memory"
_SIGNS = ("out of memory", "OutOfMemory", "allocate memory", "MemoryError", "NotEnoughMemory")
_TAIL = 20_000


def run_quietly(command: Sequence[str], output: Path, timeout_s: float) -> str:
    """Runs a command. Returns "" if it ended with code 0, otherwise why it failed in one line: `OUT_OF_MEMORY` if its
    output says so, or if it was killed.
    """
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return f"took longer than {timeout_s:.0f} s"
        finally:
            _end(process)
    if code == 0:
        return ""
    text = output.read_text(encoding="utf-8", errors="replace")[-_TAIL:]
    if any(sign in text for sign in _SIGNS) or code in (128 + signal.SIGKILL, -signal.SIGKILL):
        return OUT_OF_MEMORY
    lines = [line.partition("]: ")[2] or line for line in text.splitlines()]
    named = [line.strip() for line in lines if "Error" in line.partition(":")[0] and ":" in line]
    return named[-1][:300] if named else f"ended with code {code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the launcher, which ends its ranks."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
