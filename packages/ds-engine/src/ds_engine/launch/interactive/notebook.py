"""`ds_engine.launch.notebook`: calls a function on several ranks of this machine, and returns their results."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_engine.launch.crew import LocalCrew
from ds_engine.launch.failure import RankEnd, find_first
from ds_engine.launch.interactive.call import read_failure, read_results, write_call
from ds_engine.launch.interactive.streams import outputs_of
from ds_engine.launch.machine import usable_cores
from ds_engine.launch.network import free_port, loopback_interface
from ds_engine.launch.plan import LaunchError, LaunchPlan, Part, make_plan, refuse_nesting
from ds_engine.launch.supervise import Patience, Supervisor

LAUNCHER = "notebook"
"""Value of DS_LAUNCHER in the ranks."""


class RankFailedError(RuntimeError):
    """A rank has failed: its traceback, or why it ended."""


class _Recorded(LocalCrew):
    """Remembers how its ranks ended."""

    def __init__(self, plan: LaunchPlan) -> None:
        super().__init__(plan, outputs_of, terminal=False)
        self.ends: list[RankEnd] = []

    def collect(self) -> list[RankEnd]:
        ends = super().collect()
        self.ends += ends
        return ends


def notebook(
    function: Callable[..., Any], ranks: int, *arguments: Any, patience: Patience | None = None
) -> list[Any]:
    """Calls `function(*arguments)` on new processes, the ranks of one job, and waits for all of them.

    Each rank is a fresh interpreter with torchrun's variables, so `ds_engine.initialize` works in the function. What
    the ranks print is shown here. If one fails, all are ended.

    Args:
        function: one that other processes can import. A function that is defined in a notebook or at the prompt needs
            the package cloudpickle.
        ranks: number of processes.
        arguments: picklable arguments, the same on every rank.
        patience: time limits for ranks that are ended.

    Returns:
        The result of each rank, in the order of ranks. It must be picklable.

    Raises:
        LaunchError: the job cannot start.
        Exception: the exception of the rank that failed first; its cause has that rank's traceback.
        RankFailedError: a rank was killed, or its exception cannot be pickled.
    """
    _check(ranks)
    with tempfile.TemporaryDirectory(prefix="ds-notebook-") as name:
        folder = Path(name)
        write_call(folder, function, arguments)
        crew = _Recorded(_plan(folder, ranks))
        lines: list[str] = []
        outcome = Supervisor(crew, lines.append, patience or Patience()).run()
        if outcome.stopped:
            _stop_as_the_ranks_were(signal.Signals(outcome.code - 128))
        if outcome.code:
            _raise_failure(folder, crew.ends, lines)
        try:
            return read_results(folder, ranks)
        except FileNotFoundError as error:
            raise RankFailedError(
                f"a rank has ended with code 0 and without a result ({Path(error.filename).stem}): the function must "
                "return, and not call sys.exit"
            ) from None


def _check(ranks: int) -> None:
    """Raises LaunchError if no job can start here."""
    if ranks < 1:
        raise LaunchError(f"{ranks} ranks: at least one is required")
    if os.environ.get("DS_LAUNCHER") == LAUNCHER:
        raise LaunchError(
            "notebook() was called while a rank imported this script: call it below `if __name__ == '__main__':`"
        )
    refuse_nesting(os.environ)
    if threading.current_thread() is not threading.main_thread():
        raise LaunchError("notebook() works in the main thread only, which receives Ctrl-C")


def _plan(folder: Path, ranks: int) -> LaunchPlan:
    port, cores = free_port(), usable_cores()
    part = Part(nproc=ranks, world_size=ranks, master_port=port, interface=loopback_interface())
    target = ["-m", "ds_engine.launch.interactive.call", str(folder)]
    plan = make_plan(python=sys.executable, target=target, part=part, environ=os.environ, cores=cores)
    environs = tuple({**environ, "DS_LAUNCHER": LAUNCHER} for environ in plan.environs)
    return LaunchPlan(command=plan.command, environs=environs, reason=plan.reason)


def _stop_as_the_ranks_were(number: signal.Signals) -> None:
    """Acts on a signal that has ended the ranks as if it had come now."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    os.kill(os.getpid(), number)
    raise RankFailedError(f"the ranks were ended by {number.name}")


def _raise_failure(folder: Path, ends: list[RankEnd], lines: list[str]) -> None:
    first = find_first(ends)
    assert first is not None
    failure = read_failure(folder, first.end.rank)
    if failure is None:
        raise RankFailedError("\n".join(lines))
    cause = RankFailedError(f"on {first.end.name} of {len(ends)}:\n{failure.traceback}")
    if failure.error is None:
        raise cause
    raise failure.error from cause
