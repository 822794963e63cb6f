"""All ranks of a launch as one object, wherever they run."""

from __future__ import annotations

import dataclasses
import selectors
import signal
from collections.abc import Callable
from typing import Protocol

from ds_engine.launch import copies
from ds_engine.launch.failure import RankEnd
from ds_engine.launch.guardian import Guardian
from ds_engine.launch.machine import memory_figures, oom_kills
from ds_engine.launch.output import Outputs
from ds_engine.launch.plan import LaunchPlan
from ds_engine.launch.rank import RankProcess


class Crew(Protocol):
    """The ranks of a launch. A supervisor starts, watches and ends them.

    What is registered with the selector has a function of the file descriptor as its data, which the loop calls.
    """

    @property
    def num_ranks(self) -> int:
        """Number of ranks."""

    @property
    def is_running(self) -> bool:
        """Whether a rank has not ended."""

    @property
    def due_s(self) -> float:
        """When `collect` must be called, even if nothing happens before (monotonic clock)."""

    def start(self, selector: selectors.BaseSelector) -> None:
        """Starts the ranks."""

    def collect(self) -> list[RankEnd]:
        """Returns how ranks ended since the last call."""

    def send(self, number: signal.Signals, *, to_end: bool = True) -> None:
        """Sends a signal to each rank. to_end: record that the launcher terminates them."""

    def kill(self) -> None:
        """Kills the ranks and all processes that they started."""

    def forget(self) -> None:
        """The job will not be started again: what its ranks keep in memory is removed when they have ended."""

    def resize(self) -> None:
        """The size of the terminal has changed."""

    def close(self) -> None:
        """Kills what is left, and closes all files."""


class LocalCrew:
    """Ranks on this machine.

    terminal: rank 0 has the terminal of this process.
    """

    def __init__(
        self, plan: LaunchPlan, outputs_of: Callable[[int], Outputs], *, terminal: bool = True
    ) -> None:
        self.num_ranks = plan.num_ranks
        self.due_s = float("inf")
        self._plan = plan
        self._outputs_of = outputs_of
        self._terminal = terminal
        self._ranks: list[RankProcess] = []
        self._guardian: Guardian | None = None
        self._oom_before = oom_kills()
        self._forgets = False

    @property
    def is_running(self) -> bool:
        """Whether a rank has not ended."""
        return any(process.ended is None for process in self._ranks)

    def start(self, selector: selectors.BaseSelector) -> None:
        """Starts the ranks."""
        self._selector = selector
        self._guardian = guardian = Guardian()
        for local_rank, environ in enumerate(self._plan.environs):
            rank = self._plan.first_rank + local_rank
            process = RankProcess(
                rank,
                self._plan.command_of(local_rank),
                environ,
                self._outputs_of(rank),
                terminal=self._terminal and rank == 0,
                cores=self._plan.cores_of(local_rank),
            )
            self._ranks.append(process)
            guardian.add(process.pid)
            process.register(selector)

    def collect(self) -> list[RankEnd]:
        """Returns how ranks ended since the last call."""
        assert self._guardian is not None
        remove = self._guardian.remove
        ended = [process.reap(self._selector, remove) for process in self._ranks]
        return [self._with_memory(end) for end in ended if end is not None]

    def _with_memory(self, end: RankEnd) -> RankEnd:
        """Adds what the kernel says about the memory of a rank that was killed."""
        oom_killed = oom_kills() > self._oom_before
        killed = end.returncode == -signal.SIGKILL and not end.ended_by_us
        memory = memory_figures(end.used_bytes) if oom_killed or killed else ""
        return dataclasses.replace(end, oom_killed=oom_killed, memory=memory)

    def send(self, number: signal.Signals, *, to_end: bool = True) -> None:
        """Sends a signal to each rank that has not ended."""
        for process in self._ranks:
            process.send(number, to_end=to_end)

    def kill(self) -> None:
        """Kills the ranks and all processes that they started."""
        for process in self._ranks:
            process.kill()

    def forget(self) -> None:
        """What the ranks keep in memory for the next start is removed when they have ended."""
        self._forgets = True

    def resize(self) -> None:
        """Sets the size of rank 0's terminal to that of ours."""
        for process in self._ranks:
            process.resize()

    def stopped(self) -> list[int]:
        """Returns the ranks that a signal (SIGSTOP) has stopped."""
        return [process.rank for process in self._ranks if process.is_stopped]

    def close(self) -> None:
        """Kills what is left, and closes the output."""
        for process in self._ranks:
            process.kill()
            process.close(self._selector)
        if self._forgets:
            copies.remove(self._plan.environs[0])
        if self._guardian is not None:
            self._guardian.close()
