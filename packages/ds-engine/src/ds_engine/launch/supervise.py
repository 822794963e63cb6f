"""Runs a launch: starts the ranks, watches them in one loop without threads, and terminates them together."""

from __future__ import annotations

import enum
import selectors
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from ds_engine.launch.console import Console
from ds_engine.launch.crew import Crew, LocalCrew
from ds_engine.launch.failure import RankEnd, find_first
from ds_engine.launch.plan import LaunchPlan
from ds_engine.launch.signals import FORWARDED, STOPPING, CaughtSignals


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


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a launch ended."""

    code: int
    """Exit code for the shell: 0 if every rank returned 0; else the code of the rank that failed first, 128 + n if
    signal n killed it, or if the launcher itself received signal n."""
    stopped: bool = False
    """Whether the launcher was stopped by a signal."""
    lost: frozenset[str] = frozenset()
    """Machines that were lost."""


def run(
    plan: LaunchPlan,
    *,
    say: Callable[[str], None],
    patience: Patience | None = None,
    console: Console | None = None,
    is_last: bool = False,
) -> Outcome:
    """Starts all ranks on this machine, and waits until none is left.

    say: is called with each line for the user.
    is_last: the job will not be started again after a failure.
    """
    console = console or Console(say, inherit=True)
    crew = LocalCrew(plan, console.outputs_of)
    return Supervisor(crew, say, patience or Patience(), is_last=is_last).run()


class Supervisor:
    """Runs a crew from the first process to the last."""

    def __init__(
        self, crew: Crew, say: Callable[[str], None], patience: Patience, *, is_last: bool = False
    ) -> None:
        """is_last: the job will not be started again after a failure."""
        self._crew = crew
        self._is_last = is_last
        self._say = say
        self._patience = patience
        self._ends: list[RankEnd] = []
        self._phase = _Phase.RUNNING
        self._deadline_s = float("inf")
        self._stopped_by: signal.Signals | None = None
        self._caught: CaughtSignals | None = None

    def run(self, selector: selectors.BaseSelector | None = None) -> Outcome:
        """Returns how the launch ended. selector: one with which the crew has registered already."""
        with selector or selectors.DefaultSelector() as selector, CaughtSignals(selector) as caught:
            self._caught = caught
            try:
                self._crew.start(selector)
                self._watch(selector)
                if self._is_last or self._stopped_by is not None or not any(e.failed for e in self._ends):
                    self._crew.forget()
            finally:
                self._crew.close()
        return self._conclude()

    def act_on_signals(self) -> None:
        """Acts on the signals that this process has received, also while its loop waits for the terminal."""
        for number in self._caught.take() if self._caught is not None else ():
            self._act_on(number)

    def _watch(self, selector: selectors.BaseSelector) -> None:
        while self._crew.is_running:
            left_s = min(self._deadline_s, self._crew.due_s) - time.monotonic()
            for key, _ in selector.select(timeout=None if left_s == float("inf") else max(0.0, left_s)):
                key.data(key.fd)
            self.act_on_signals()
            for end in self._crew.collect():
                self._ends.append(end)
                if end.failed and self._phase is _Phase.RUNNING:
                    self._enter(_Phase.SETTLING, self._patience.settle_s)
            if time.monotonic() >= self._deadline_s:
                self._next_phase()

    def _act_on(self, number: signal.Signals) -> None:
        if number == signal.SIGWINCH:
            self._crew.resize()
        elif number in FORWARDED:
            self._crew.send(number, to_end=False)
        elif number in STOPPING:
            self._stop(number)

    def _stop(self, number: signal.Signals) -> None:
        """Forwards the first signal; on a second one, terminates the ranks at once."""
        if self._stopped_by is not None:
            self._say(f"{number.name} again: terminating the ranks at once")
            self._kill()
            return
        self._stopped_by = number
        self._say(
            f"{number.name}: forwarded to {self._crew.num_ranks} ranks, which have {self._patience.stop_s:g} s to exit"
        )
        self._crew.send(number)
        self._enter(_Phase.ENDING, self._patience.stop_s)

    def _next_phase(self) -> None:
        if self._phase is _Phase.SETTLING:
            self._crew.send(signal.SIGTERM)
            self._enter(_Phase.ENDING, self._patience.grace_s)
        else:
            self._kill()

    def _kill(self) -> None:
        self._crew.kill()
        self._enter(_Phase.KILLING, float("inf"))

    def _enter(self, phase: _Phase, seconds: float) -> None:
        self._phase = phase
        self._deadline_s = time.monotonic() + seconds

    def _conclude(self) -> Outcome:
        lost = frozenset(end.host for end in self._ends if end.lost)
        finding = find_first(self._ends)
        if self._stopped_by is not None:
            names = ", ".join(sorted(lost))
            left = f"; no rank is left{f', as far as is known: {names} was lost' if lost else ''}"
            self._say(f"stopped by {self._stopped_by.name}{left}")
            return Outcome(code=128 + int(self._stopped_by), stopped=True, lost=lost)
        if finding is None:
            return Outcome(code=0)
        for line in finding.lines:
            self._say(line)
        return Outcome(code=finding.exit_code, lost=lost)
