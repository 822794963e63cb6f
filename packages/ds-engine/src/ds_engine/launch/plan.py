"""What a local launch will start, as a value: computed without starting anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class LaunchError(ValueError):
    """A launch that cannot work; the message says why and what to do instead."""


LOCAL_RANK = "--local_rank={}"
"""An argument of the target that becomes --local_rank=0, 1, ...: old scripts learn their rank from it."""


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """The processes of one job on this machine."""

    command: tuple[str, ...]
    """The same for every rank, but for LOCAL_RANK."""
    environs: tuple[Mapping[str, str], ...]
    """One environment per rank."""
    reason: str
    """Why this many: shown at the start."""

    def command_of(self, rank: int) -> tuple[str, ...]:
        """What one rank runs."""
        return tuple(LOCAL_RANK.format(rank) if word == LOCAL_RANK else word for word in self.command)

    @property
    def num_ranks(self) -> int:
        """Number of processes."""
        return len(self.environs)


def choose_nproc(wish: int | None, num_accelerators: int, cores: int) -> tuple[int, str]:
    """Number of ranks and why: `wish`, else one per accelerator, else two (one on a single core)."""
    if wish is not None:
        if wish < 1:
            raise LaunchError(f"--nproc {wish}: at least one process is needed")
        return wish, "as asked for with --nproc"
    if num_accelerators:
        return num_accelerators, "one for each accelerator"
    return min(2, cores), "no accelerator found: CPU processes; --nproc sets another number"


def make_plan(
    *,
    python: str | None,
    target: Sequence[str],
    nproc: int,
    reason: str,
    environ: Mapping[str, str],
    cores: int,
    port: int,
    loopback: str | None,
) -> LaunchPlan:
    """The commands and environments of a job.

    python: the interpreter; None where the target is a program of its own.
    target: what follows the interpreter: a script with its arguments, or "-m", a module and its arguments.
    cores: usable cores of this machine, divided among the ranks' OpenMP threads.
    port: TCP port on which rank 0 will listen.
    loopback: name of the loopback interface, for gloo; None leaves the choice to gloo.

    Raises LaunchError inside a launcher that has started several tasks already.
    """
    _refuse_nesting(environ)
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores // nproc)),  # more threads than cores make every rank slower
        "PYTHONUNBUFFERED": "1",  # what a rank printed before it died is worth most
        "PYTHONFAULTHANDLER": "1",  # a crash in native code leaves a stack
    }
    if loopback is not None:
        # gloo looks up the name of the host otherwise, which fails on machines that do not know their own
        # name.
        defaults["GLOO_SOCKET_IFNAME"] = loopback
    shared = {
        **defaults,
        **environ,
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_LAUNCHER": "ds run",  # read by ds_comm, for the table at the start and for errors
    }
    environs = tuple({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(nproc))
    return LaunchPlan(command=(*([python] if python else []), *target), environs=environs, reason=reason)


def _refuse_nesting(environ: Mapping[str, str]) -> None:
    """Each task of srun or mpirun would start a job of its own, and all would train the same."""
    for name, launcher in (
        ("SLURM_STEP_NUM_TASKS", "srun"),
        ("OMPI_COMM_WORLD_SIZE", "mpirun"),
        ("PMI_SIZE", "mpiexec"),
    ):
        count = environ.get(name, "")
        if count.isdigit() and int(count) > 1:
            raise LaunchError(
                f"`ds run` starts all ranks of one machine, but {launcher} has already started {count} "
                f"processes ({name}={count}), each of which would start a job of its own: run the script "
                f"itself with {launcher} (`{launcher} python script.py`), or unset {name}"
            )
