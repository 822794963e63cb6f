"""Determines which rank failed first, and the message for the user: pure functions of how the ranks ended."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

SUMMARY_LINES = 30
"""Maximum number of lines of the failure summary, which must fit on a screen."""
_SHOWN_LINES = SUMMARY_LINES - 7
"""Maximum number of lines of a traceback, or of the end of stderr."""
_MESSAGE_LINES = 14
"""Maximum number of lines of the exception message."""
_LOGGED_S = 5.0  # a traceback that was printed this long before the first rank ended was logged and handled
_FRAMES = re.compile(r"^Traceback \(most recent call last\):$", re.MULTILINE)
_CHAINED = ("The above exception was the direct cause", "During handling of the above exception")
# Messages of collectives when another rank has died. A rank with such an error is not the cause, even if it ended
# first: the rank that failed may take longer to shut down than other ranks to notice.
_VICTIM = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|socket closed|remote process exited|timed out|"
    r"ncclRemoteError|ncclSystemError|DistNetworkError|DistBackendError|heartbeat|peer.*(gone|closed)",
    re.IGNORECASE,
)
_FULL_DISK = re.compile(r"No space left on device|Disk quota exceeded", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class RankEnd:
    """How one rank ended."""

    rank: int
    pid: int
    returncode: int
    """As in subprocess: exit code, or minus the number of the signal."""
    ended_s: float
    """When the launcher noticed its end (monotonic clock)."""
    ended_by_us: bool = False
    """Whether the launcher had sent it a signal."""
    traceback_s: float | None = None
    """When its last traceback began (monotonic clock)."""
    stderr: str = ""
    """The end of its stderr."""
    used_bytes: int = 0
    """The most resident memory that it, or a process that it waited for, had at a time."""
    oom_killed: bool = False
    """Whether the kernel reports that its OOM killer killed a process of this job on the machine of the rank."""
    memory: str = ""
    """The memory that the rank could use and what it used, if it was killed; from `machine.memory_figures`."""
    host: str = ""
    """Name of its machine; empty if the job has one machine."""
    lost: str = ""
    """Why nothing is known about its end: the reason for which its machine is considered lost."""

    @property
    def failed(self) -> bool:
        """Whether it ended with anything but code 0."""
        return self.returncode != 0 or bool(self.lost)

    @property
    def name(self) -> str:
        """The rank and its machine: "rank 3 on host-b"."""
        return f"rank {self.rank} on {self.host}" if self.host else f"rank {self.rank}"


@dataclass(frozen=True)
class Finding:
    """The message for the user, and the exit code for the shell."""

    end: RankEnd
    exit_code: int
    lines: tuple[str, ...]


def find_first(ends: Sequence[RankEnd]) -> Finding | None:
    """Finds the rank that failed first; None if every rank ended with code 0."""
    failed = [end for end in ends if end.failed and not end.ended_by_us]
    if not failed:
        failed = [end for end in ends if end.failed]
        if not failed:
            return None
    first_end_s = min(end.ended_s for end in failed)
    # A rank that the launcher terminated may have failed first and shut down slowly; its traceback shows it.
    failed += [
        end
        for end in ends
        if end.ended_by_us and end not in failed and (end.traceback_s or 0.0) > first_end_s - _LOGGED_S
    ]
    first = min(failed, key=lambda end: (_is_victim(end), _failed_s(end)))
    code = 128 - first.returncode if first.returncode < 0 else first.returncode or 1
    if (
        first.ended_by_us
    ):  # its exit code was replaced by our signal; a Python program that raises exits with 1
        code = 1
    return Finding(first, code, tuple(_describe(first, ends)))


def _failed_s(end: RankEnd) -> float:
    if end.traceback_s is not None and end.traceback_s > end.ended_s - 60.0:
        return min(end.traceback_s, end.ended_s)
    return end.ended_s


def _is_victim(end: RankEnd) -> bool:
    if end.lost:
        return False
    if end.returncode < 0 and not end.ended_by_us:
        return end.returncode == -signal.SIGABRT and bool(_VICTIM.search(end.stderr))
    return bool(_VICTIM.search(exception_line(last_traceback(end.stderr))))


def last_traceback(stderr: str) -> str:
    """Returns the end of `stderr` from its last Python traceback on, including chained exceptions; "" without one."""
    starts = [match.start() for match in _FRAMES.finditer(stderr)]
    if not starts:
        return ""
    start = starts.pop()
    while starts and any(text in stderr[starts[-1] : start] for text in _CHAINED):
        start = starts.pop()
    return stderr[start:].rstrip()


def exception_line(traceback: str) -> str:
    """Returns the line with the exception: the first line after the frames of the last traceback."""
    frames = traceback[traceback.rfind("Traceback (most recent call last):") :].split("\n")[1:]
    return next((line for line in frames if line and not line[0].isspace()), "")


def shortened(traceback: str) -> list[str]:
    """Returns at most `_SHOWN_LINES` lines of a traceback: the exception and the innermost frames.

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


def _describe(first: RankEnd, ends: Sequence[RankEnd]) -> list[str]:
    if first.lost:
        return _describe_lost(first, ends)
    how = "an exception" if first.ended_by_us else describe_exit(first.returncode)
    where = f"{first.host}, pid {first.pid}" if first.host else f"pid {first.pid}"
    lines = [f"rank {first.rank} ({where}) failed first: {how}"]
    traceback = last_traceback(first.stderr)
    shown = shortened(traceback) if traceback else first.stderr.rstrip().split("\n")[-_SHOWN_LINES:]
    if any(line.strip() for line in shown):
        lines += ["", "its traceback:" if traceback else "the end of its stderr:"]
        lines += [f"  {line}".rstrip() for line in shown]
    others = [end for end in ends if end is not first]
    if others:
        lines += ["", f"the other ranks: {_others(others)}"]
    lines += ["", f"what to do: {_remedy(first, bool(traceback))}"]
    return lines


def _describe_lost(first: RankEnd, ends: Sequence[RankEnd]) -> list[str]:
    with_it = [end for end in ends if end.lost and end.host == first.host]
    numbers = ", ".join(str(end.rank) for end in with_it)
    lines = [
        f"machine {first.host} was lost first, with rank{'s' * (len(with_it) > 1)} {numbers}: {first.lost}"
    ]
    others = [end for end in ends if end not in with_it]
    if others:
        lines += ["", f"the other ranks: {_others(others)}"]
    return [
        *lines,
        "",
        f"what to do: check that {first.host} is up and that the network reaches it; leave it out with --exclude "
        f"{first.host} to start again without it. A job with checkpoints resumes from the newest complete one",
    ]


def _others(ends: Sequence[RankEnd]) -> str:
    """How other ranks ended, in at most a few lines: ranks that ended alike are listed together."""
    alike: dict[str, list[RankEnd]] = {}
    for end in sorted(ends, key=lambda end: end.rank):
        alike.setdefault(_other(end), []).append(end)
    groups = [
        f"{same[0].name} {how}"
        if len(same) == 1
        else f"ranks {_ranges(same)} {how.replace('was terminated', 'were terminated')}"
        for how, same in alike.items()
    ]
    return ", ".join(groups)


def _ranges(ends: Sequence[RankEnd]) -> str:
    """Numbers of ranks, with runs of neighbours as first-last."""
    runs: list[list[int]] = []
    for end in ends:
        if runs and end.rank == runs[-1][1] + 1:
            runs[-1][1] = end.rank
        else:
            runs.append([end.rank, end.rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _other(end: RankEnd) -> str:
    if end.lost:
        return f"lost with its machine ({end.lost})"
    if end.returncode == 0:
        return "had finished"
    if end.ended_by_us:
        return "was terminated by the launcher"
    return describe_exit(end.returncode)


def _remedy(end: RankEnd, has_traceback: bool) -> str:
    oom_killed = end.oom_killed
    number = -end.returncode if not end.ended_by_us else 0
    if oom_killed or number == signal.SIGKILL:
        cause = "the kernel's OOM killer killed it" if oom_killed else "SIGKILL usually means out of memory"
        cause += f": {end.memory}" if end.memory else ""
        return (
            f"{cause} (`ds doctor` shows the limit, `dmesg` the kernel's message). Use a smaller "
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
        return "another process sent this signal: check the batch system, a time limit, or other users"
    if _FULL_DISK.search(exception_line(last_traceback(end.stderr))):
        where = f" on {end.host}" if end.host else ""
        return f"the disk{where} is full (`df -h` there): free space, or write elsewhere, and start again"
    if has_traceback:
        return (
            "fix the error above and start again; a job with checkpoints resumes from the newest complete one"
        )
    return "it ended without a traceback: look at its output above, and try `ds run --nproc 1` with the same script"
