"""Starts a job again after a failure, on the machines that are left."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ds_engine.launch.copies import JOB
from ds_engine.launch.hosts import Pool
from ds_engine.launch.plan import LaunchError
from ds_engine.launch.supervise import Outcome

RESTART_COUNT = "DS_RESTART_COUNT"
"""Environment variable of every rank: how often the job was started again, "0" at first."""
_TORCHRUN_RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"


@dataclass(frozen=True, kw_only=True)
class Restarts:
    """How often a job may be started again, and on how many machines."""

    limit: int = 0
    """Maximum number of restarts."""
    min_nodes: int | None = None
    """Smallest number of machines on which the job may go on; None: as many as at first."""

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise LaunchError(f"--max-restarts {self.limit}: at least 0 is required")
        if self.min_nodes is not None and self.min_nodes < 1:
            raise LaunchError(f"--min-nodes {self.min_nodes}: at least one machine is required")


class UnusableHostsError(LaunchError):
    """The job cannot start because of some of its machines."""

    def __init__(
        self, message: str, unreachable: Sequence[str] = ()
    ) -> None:  # unpickled by the message alone
        super().__init__(message)
        self.unreachable = frozenset(unreachable)
        """Machines that cannot be reached; empty if another reason keeps the job from starting."""


def job_name(environ: Mapping[str, str]) -> str:
    """Returns the name of a job: the user's, or a random one."""
    return environ.get(JOB) or secrets.token_hex(8)


def restart_environ(job: str, number: int) -> Mapping[str, str]:
    """Returns the variables that tell a rank the name of its job, and how often it was started again."""
    return {JOB: job, RESTART_COUNT: str(number), _TORCHRUN_RESTART_COUNT: str(number)}


def run_again(start: Callable[[int], Outcome], restarts: Restarts, say: Callable[[str], None]) -> Outcome:
    """Calls `start` with the number of the restart, 0 at first, until the job succeeds, is stopped by a signal, or has
    been started again `restarts.limit` times. Returns the last outcome.
    """
    number = 0
    while True:
        outcome = start(number)
        if outcome.code == 0 or outcome.stopped or number >= restarts.limit:
            return outcome
        number += 1
        say(
            f"restart {number} of {restarts.limit}: ranks resume from what the script loads, its newest checkpoint"
        )


class Candidates:
    """The machines on which a job may run, in order of preference. A machine that was lost in one attempt is left out
    of the next one, and is a candidate again in the one after.
    """

    def __init__(
        self, pool: Pool, num_nodes: int | None, restarts: Restarts, say: Callable[[str], None]
    ) -> None:
        """
        Args:
            pool: machine -> slots, all machines that may be used.
            num_nodes: number of machines of the job; the rest are spares. None: all of them.

        Raises:
            LaunchError: min_nodes is more than the job has.
        """
        self._pool = pool
        self._most = len(pool) if num_nodes is None else num_nodes
        self._least = self._most if restarts.min_nodes is None else restarts.min_nodes
        self._say = say
        self._lost: frozenset[str] = frozenset()
        if self._least > self._most:
            raise LaunchError(f"--min-nodes {self._least} is more than the {self._most} machines of the job")

    def attempt(self, run: Callable[[Pool], Outcome]) -> Outcome:
        """Calls `run` with machines and their slots. If some cannot be reached, others take their place.

        Raises:
            LaunchError: too few machines are left, or the job cannot start for another reason.
        """
        left_out = self._lost
        while True:
            usable = {host: slots for host, slots in self._pool.items() if host not in left_out}
            chosen = dict(list(usable.items())[: self._most])
            if len(chosen) < self._least:
                raise LaunchError(
                    f"{len(chosen)} of {len(self._pool)} machines are left ({', '.join(sorted(left_out))} lost), and "
                    f"the job needs {self._least}: --min-nodes allows fewer, and further lines of the host file add "
                    "spares"
                )
            if left_out:
                self._say(f"without {', '.join(sorted(left_out))}: {len(chosen)} machines")
            try:
                outcome = run(chosen)
            except UnusableHostsError as error:
                if not error.unreachable or len(usable) - len(error.unreachable) < self._least:
                    raise
                for line in str(error).splitlines()[1:]:
                    self._say(line.strip())
                left_out |= error.unreachable
                continue
            self._lost = outcome.lost
            return outcome
