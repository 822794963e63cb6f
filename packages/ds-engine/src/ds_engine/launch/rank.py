"""The process of one rank."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ds_engine.launch.failure import RankEnd
from ds_engine.launch.output import Outputs, Sink, Tail, copy_window_size, open_channel

_PR_SET_PDEATHSIG = 1
_STDOUT, _STDERR = 1, 2


class RankProcess:
    """Starts one rank, passes its output on, and records how it ended.

    Each rank is the leader of its own session, so that it gets a signal only once (from us), and all processes that it
    started can be terminated with it.

    terminal: the rank has our stdin, and its output streams are terminals where ours are; its stdout is ours unless
    `outputs` has a sink for it.
    cores: numbers of the cores to which it is bound; none for all.
    """

    def __init__(
        self,
        rank: int,
        command: Sequence[str],
        environ: Mapping[str, str],
        outputs: Outputs,
        *,
        terminal: bool,
        cores: Sequence[int] = (),
    ) -> None:
        self.rank = rank
        self.ended: RankEnd | None = None
        self.signalled = False
        self._tail = Tail()
        self._streams: dict[int, Sink] = {}
        self._stderr, their_stderr = open_channel(_STDERR) if terminal else os.pipe()
        self._streams[self._stderr] = outputs.stderr
        their_stdout: int | None = None
        if outputs.stdout is not None:
            stdout, their_stdout = open_channel(_STDOUT) if terminal else os.pipe()
            self._streams[stdout] = outputs.stdout
        try:
            self._process = subprocess.Popen(
                command,
                env=dict(environ),
                stdin=None if terminal else subprocess.DEVNULL,
                stdout=their_stdout,
                stderr=their_stderr,
                start_new_session=True,
                preexec_fn=ChildSetup(cores),
            )
        finally:
            os.close(their_stderr)
            if their_stdout is not None:
                os.close(their_stdout)
        for stream in self._streams:
            os.set_blocking(stream, False)

    @property
    def pid(self) -> int:
        """Process id, which is also that of its process group."""
        return self._process.pid

    @property
    def is_stopped(self) -> bool:
        """Whether a signal (SIGSTOP, or a debugger) has stopped it."""
        if self.ended is not None or sys.platform != "linux":
            return False
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
        return False

    def register(self, selector: selectors.BaseSelector) -> None:
        """Registers the output with `selector`; the data of each key is the function that reads the stream."""
        for stream in self._streams:
            selector.register(stream, selectors.EVENT_READ, functools.partial(self._pump, selector))

    def _pump(self, selector: selectors.BaseSelector, stream: int) -> None:
        """Passes the available output on; unregisters the stream at its end."""
        try:
            data = os.read(stream, 1 << 16)
        except BlockingIOError:
            return
        except OSError:  # a pseudo-terminal returns EIO if its other end is closed
            data = b""
        if data:
            self._streams[stream].feed(data)
            if stream == self._stderr:
                self._tail.feed(data)
            return
        selector.unregister(stream)
        self._streams.pop(stream).close()
        os.close(stream)

    def send(self, number: signal.Signals, *, to_end: bool = True) -> None:
        """Sends a signal to the rank, unless it has ended. to_end: record that the launcher terminates it."""
        if self.ended is None and not self._is_dead():
            self.signalled = self.signalled or to_end
            os.kill(self.pid, number)  # Popen.send_signal would reap it, and its process id could be reused

    def kill(self) -> None:
        """Kills the rank and all processes that it started."""
        if self.ended is None:
            self.signalled = self.signalled or not self._is_dead()
            self._kill_group()

    def reap(self, selector: selectors.BaseSelector, before: Callable[[int], None]) -> RankEnd | None:
        """Returns how the rank ended, once; before, kills its remaining processes, and reads the rest of its output.

        before: is called with the process id before it may be reused.
        """
        if self.ended is not None or not self._is_dead():
            return None
        ended_s = time.monotonic()
        self._kill_group()
        before(self.pid)
        _, status, usage = os.wait4(self.pid, 0)
        returncode = self._process.returncode = os.waitstatus_to_exitcode(status)
        for stream in list(self._streams):
            while stream in self._streams and self._has_data(stream):
                self._pump(selector, stream)
        self.ended = RankEnd(
            rank=self.rank,
            pid=self.pid,
            returncode=returncode,
            ended_s=ended_s,
            ended_by_us=self.signalled,
            traceback_s=self._tail.traceback_s,
            stderr=self._tail.text(),
            used_bytes=usage.ru_maxrss * 1024,
        )
        return self.ended

    def resize(self) -> None:
        """Sets the size of the rank's terminal to that of ours."""
        if self._stderr in self._streams:
            copy_window_size(_STDERR, self._stderr)

    def close(self, selector: selectors.BaseSelector) -> None:
        """Closes streams that a process outside of the rank's session still holds open."""
        for stream in list(self._streams):
            selector.unregister(stream)
            self._streams.pop(stream).close()
            os.close(stream)

    def _is_dead(self) -> bool:
        # WNOWAIT: as long as the dead leader is not reaped, its process id cannot be reused.
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _kill_group(self) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # no process left, or only processes of another user
            return

    @staticmethod
    def _has_data(stream: int) -> bool:
        with selectors.DefaultSelector() as probe:
            probe.register(stream, selectors.EVENT_READ)
            return bool(probe.select(timeout=0))


class ChildSetup:
    """Runs in the child before its program: makes the kernel kill it when the launcher dies, even by kill -9, and
    binds it to cores.

    Between fork and exec of a process with one thread (this one) calling Python is safe; the library is
    loaded beforehand.
    """

    def __init__(self, cores: Sequence[int] = ()) -> None:
        self._cores = cores
        self._prctl = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None
        self._parent = os.getpid()

    def __call__(self) -> None:
        if self._cores:
            os.sched_setaffinity(0, self._cores)
        if self._prctl is not None:
            self._prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
            if os.getppid() != self._parent:  # it died before the call above
                os._exit(1)
