"""Which rank failed first, and what to tell the user: pure functions over how the ranks ended."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

SUMMARY_LINES = 30
"""At most so many lines say how a job failed: they have to fit on a screen, below what the ranks wrote themselves."""
_SHOWN_LINES = SUMMARY_LINES - 7
"""Of a traceback, or of the end of stderr: without the lines around them."""
_MESSAGE_LINES = 14
"""Of the exception itself, which may explain at length."""
_LOGGED_S = 5.0  # a traceback older than this, before the first end, was logged and survived
_FRAMES = re.compile(r"^Traceback \(most recent call last\):$", re.MULTILINE)
_CHAINED = ("The above exception was the direct cause", "During handling of the above exception")
# What collectives say when another rank is gone. Such a rank is a victim, even if it was the first to end:
# the rank that failed first may take longer to shut down than its peers to notice.
_VICTIM = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|socket closed|remote process exited|timed out|"
    r"ncclRemoteError|ncclSystemError|DistNetworkError|DistBackendError|heartbeat|peer.*(gone|closed)",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class RankEnd:
    """How one rank ended."""

    rank: int
    pid: int
    returncode: int
    """As subprocess gives it: exit code, or minus the number of the signal."""
    ended_s: float
    """When it was seen to have ended (monotonic clock)."""
    ended_by_us: bool = False
    """Whether the launcher had sent it a signal before."""
    traceback_s: float | None = None
    """When its last traceback began to arrive (monotonic clock)."""
    stderr: str = ""
    """The last part of what it wrote there."""


@dataclass(frozen=True)
class Finding:
    """The result: for the user, and for the shell."""

    end: RankEnd
    exit_code: int
    lines: tuple[str, ...]


def find_first(ends: Sequence[RankEnd], *, oom_killed: bool = False) -> Finding | None:
    """The rank that failed first among all ranks of a job; None if every rank ended with code 0.

    oom_killed: whether the kernel reports that it killed a process of this job for want of memory.
    """
    failed = [end for end in ends if end.returncode != 0 and not end.ended_by_us]
    if not failed:
        failed = [end for end in ends if end.returncode != 0]
        if not failed:
            return None
    first_end_s = min(end.ended_s for end in failed)
    # A rank that we ended may have been the first to fail, and slow to shut down: its traceback tells.
    failed += [
        end
        for end in ends
        if end.ended_by_us and end not in failed and (end.traceback_s or 0.0) > first_end_s - _LOGGED_S
    ]
    first = min(failed, key=lambda end: (_is_victim(end), _failed_s(end)))
    code = 128 - first.returncode if first.returncode < 0 else first.returncode
    if first.ended_by_us:  # its own code was lost to our signal; a Python program that raises exits with 1
        code = 1
    return Finding(first, code, tuple(_describe(first, ends, oom_killed)))


def _failed_s(end: RankEnd) -> float:
    if end.traceback_s is not None and end.traceback_s > end.ended_s - 60.0:
        return min(end.traceback_s, end.ended_s)
    return end.ended_s


def _is_victim(end: RankEnd) -> bool:
    if end.returncode < 0 and not end.ended_by_us:
        return end.returncode == -signal.SIGABRT and bool(_VICTIM.search(end.stderr))
    return bool(_VICTIM.search(exception_line(last_traceback(end.stderr))))


def last_traceback(stderr: str) -> str:
    """The end of `stderr` from its last Python traceback on, with the exceptions chained to it; "" without one."""
    starts = [match.start() for match in _FRAMES.finditer(stderr)]
    if not starts:
        return ""
    start = starts.pop()
    while starts and any(text in stderr[starts[-1] : start] for text in _CHAINED):
        start = starts.pop()
    return stderr[start:].rstrip()


def exception_line(traceback: str) -> str:
    """The line that names the exception: the first after the last traceback's frames."""
    frames = traceback[traceback.rfind("Traceback (most recent call last):") :].split("\n")[1:]
    return next((line for line in frames if line and not line[0].isspace()), "")


def shortened(traceback: str) -> list[str]:
    """At most `_SHOWN_LINES` lines of a traceback: what it says, and the innermost frames.

    Of chained exceptions the last one is kept, which explains the others; of a long message its beginning.
    """
    lines = traceback.split("\n")
    if len(lines) <= _SHOWN_LINES:
        return lines
    start = max(i for i, line in enumerate(lines) if _FRAMES.match(line))
    first = next(
        (i for i in range(start + 1, len(lines)) if lines[i] and not lines[i][0].isspace()), len(lines)
    )
    message = lines[first:]
    if len(message) > _MESSAGE_LINES:
        message = [*message[: _MESSAGE_LINES - 1], f"... {len(message) - _MESSAGE_LINES + 1} lines more ..."]
    frames = lines[start + 1 : first]
    kept = frames[-(_SHOWN_LINES - len(message) - 2) :]
    left_out = len(lines) - len(message) - len(kept) - 1
    return [lines[start], *([f"  ... {left_out} lines ..."] if left_out > 0 else []), *kept, *message]


def describe_exit(returncode: int) -> str:
    """In words: exit code 3, or killed by SIGKILL."""
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"


def _describe(first: RankEnd, ends: Sequence[RankEnd], oom_killed: bool) -> list[str]:
    how = "an exception" if first.ended_by_us else describe_exit(first.returncode)
    lines = [f"rank {first.rank} (pid {first.pid}) failed first: {how}"]
    traceback = last_traceback(first.stderr)
    shown = shortened(traceback) if traceback else first.stderr.rstrip().split("\n")[-_SHOWN_LINES:]
    if any(line.strip() for line in shown):
        lines += ["", "its traceback:" if traceback else "the end of its stderr:"]
        lines += [f"  {line}".rstrip() for line in shown]
    others = [end for end in ends if end is not first]
    if others:
        lines += ["", "the other ranks: " + ", ".join(_other(end) for end in others)]
    lines += ["", f"what to do: {_remedy(first, bool(traceback), oom_killed)}"]
    return lines


def _other(end: RankEnd) -> str:
    if end.returncode == 0:
        return f"rank {end.rank} had finished"
    if end.ended_by_us:
        return f"rank {end.rank} was ended by the launcher"
    return f"rank {end.rank} {describe_exit(end.returncode)}"


def _remedy(end: RankEnd, has_traceback: bool, oom_killed: bool) -> str:
    number = -end.returncode if not end.ended_by_us else 0
    if oom_killed or number == signal.SIGKILL:
        cause = (
            "the kernel ended it for want of memory" if oom_killed else "SIGKILL usually means: out of memory"
        )
        return (
            f"{cause} (`ds doctor` shows the limit, `dmesg` the kernel's note). Use a smaller "
            f"train_micro_batch_size_per_gpu, a higher zero_optimization.stage, or fewer processes (--nproc)"
        )
    if number == signal.SIGBUS:
        return "SIGBUS usually means that /dev/shm is full: `ds doctor` shows its size; enlarge it (docker --shm-size)"
    if number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE):
        return (
            "native code crashed; the stack that faulthandler printed above names the last Python line. `ds "
            "doctor` checks the versions; `ds run --nproc 1` shows whether a single process crashes too"
        )
    if number > 0:
        return (
            "something outside sent it this signal: look at the batch system, a time limit, or another user"
        )
    if has_traceback:
        return "mend the error above and start again; a job with checkpoints continues from the newest complete one"
    return "it ended without a traceback: look at its output above, and try `ds run --nproc 1` with the same script"
