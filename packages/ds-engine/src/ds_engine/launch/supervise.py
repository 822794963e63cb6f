"""Runs a launch plan: starts the ranks, watches them in one loop without threads, and terminates them together."""

from __future__ import annotations

import enum
import os
import selectors
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from ds_engine.launch.failure import find_first
from ds_engine.launch.machine import oom_kills
from ds_engine.launch.plan import LaunchPlan
from ds_engine.launch.rank import RankProcess

_FORWARDED = (signal.SIGUSR1, signal.SIGUSR2)  # batch systems send these before they end a job
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Time limits of the launcher, in seconds."""

    settle_s: float = 1.0
    """Time after a failure in which other ranks may fail, so that the rank that failed first can be determined."""
    grace_s: float = 10.0
    """Time between SIGTERM and SIGKILL."""
    stop_s: float = 30.0
    """Time after a forwarded signal, in which ranks may write a checkpoint."""


class _Phase(enum.Enum):
    """The phase of the launcher. In every phase it owns all processes of the job."""

    RUNNING = enum.auto()
    """The ranks are running."""
    SETTLING = enum.auto()
    """A rank has failed; others may still fail by themselves."""
    ENDING = enum.auto()
    """All ranks have got SIGTERM."""
    KILLING = enum.auto()
    """All ranks have got SIGKILL."""


def run(plan: LaunchPlan, *, say: Callable[[str], None], patience: Patience | None = None) -> int:
    """Starts all ranks, waits until none is left, and returns the exit code for the shell.

    0 if every rank returned 0; else the code of the rank that failed first, 128 + n if signal n killed it, or
    if the launcher itself received signal n. `say` is called with each line for the user.
    """
    return _Supervisor(plan, say, patience or Patience()).run()


class _Supervisor:
    def __init__(self, plan: LaunchPlan, say: Callable[[str], None], patience: Patience) -> None:
        self._plan = plan
        self._say = say
        self._patience = patience
        self._ranks: list[RankProcess] = []
        self._phase = _Phase.RUNNING
        self._deadline_s = float("inf")
        self._stopped_by: signal.Signals | None = None
        self._received: list[int] = []

    def run(self) -> int:
        """One launch, from the first process to the last."""
        oom_before = oom_kills()
        wake, woken = os.pipe()
        for end in (wake, woken):
            os.set_blocking(end, False)
        caught = [signal.SIGCHLD, signal.SIGWINCH]
        # A signal that is ignored already (nohup, a background job of a shell) stays ignored, also in the ranks.
        caught += [n for n in (*_FORWARDED, *_STOPPING) if signal.getsignal(n) != signal.SIG_IGN]
        handlers = {number: signal.signal(number, self._note) for number in caught}
        previous_fd = signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        with selectors.DefaultSelector() as selector:
            selector.register(wake, selectors.EVENT_READ, None)
            try:
                for rank, environ in enumerate(self._plan.environs):
                    self._ranks.append(RankProcess(rank, self._plan.command_of(rank), environ))
                    self._ranks[-1].register(selector)
                self._watch(selector, wake)
            finally:
                for process in self._ranks:
                    process.kill()
                    process.close(selector)
                signal.set_wakeup_fd(previous_fd)
                for number, handler in handlers.items():
                    signal.signal(number, handler)
                os.close(wake)
                os.close(woken)
        return self._conclude(oom_kills() > oom_before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)  # handled in the loop

    def _watch(self, selector: selectors.BaseSelector, wake: int) -> None:
        while any(process.ended is None for process in self._ranks):
            left_s = self._deadline_s - time.monotonic()
            for key, _ in selector.select(timeout=None if left_s == float("inf") else max(0.0, left_s)):
                if isinstance(key.data, RankProcess):
                    key.data.pump(key.fd, selector)
                else:
                    os.read(wake, 4096)
            self._act_on_signals()
            for process in self._ranks:
                if process.reap(selector) and process.ended is not None and process.ended.returncode != 0:
                    self._a_rank_failed()
            if time.monotonic() >= self._deadline_s:
                self._next_phase()

    def _act_on_signals(self) -> None:
        received, self._received = self._received, []
        for number in received:
            if number == signal.SIGWINCH:
                for process in self._ranks:
                    process.resize()
            elif number in _FORWARDED:
                for process in self._ranks:
                    process.send(signal.Signals(number), to_end=False)
            elif number in _STOPPING:
                self._stop(signal.Signals(number))

    def _stop(self, number: signal.Signals) -> None:
        """Forwards the first signal; on a second one, terminates the ranks at once."""
        if self._stopped_by is not None:
            self._say(f"{number.name} again: terminating the ranks at once")
            self._kill()
            return
        self._stopped_by = number
        self._say(
            f"{number.name}: forwarded to {len(self._ranks)} ranks, which have {self._patience.stop_s:g} s to exit"
        )
        for process in self._ranks:
            process.send(number)
        self._enter(_Phase.ENDING, self._patience.stop_s)

    def _a_rank_failed(self) -> None:
        if self._phase is _Phase.RUNNING:
            self._enter(_Phase.SETTLING, self._patience.settle_s)

    def _next_phase(self) -> None:
        if self._phase is _Phase.SETTLING:
            for process in self._ranks:
                process.send(signal.SIGTERM)
            self._enter(_Phase.ENDING, self._patience.grace_s)
        else:
            self._kill()

    def _kill(self) -> None:
        for process in self._ranks:
            process.kill()
        self._enter(_Phase.KILLING, float("inf"))

    def _enter(self, phase: _Phase, seconds: float) -> None:
        self._phase = phase
        self._deadline_s = time.monotonic() + seconds

    def _conclude(self, oom_killed: bool) -> int:
        ends = [process.ended for process in self._ranks if process.ended is not None]
        if self._stopped_by is not None:
            self._say(f"stopped by {self._stopped_by.name}; no rank is left")
            return 128 + int(self._stopped_by)
        finding = find_first(ends, oom_killed=oom_killed)
        if finding is None:
            return 0
        for line in finding.lines:
            self._say(line)
        return finding.exit_code
