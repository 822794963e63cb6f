"""The plan of a local launch: a value, computed without starting anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class LaunchError(ValueError):
    """The job cannot be launched. The message says why, and the remedy."""


LOCAL_RANK = "--local_rank={}"
"""Placeholder argument that is replaced by --local_rank=0, 1, ..., for old scripts that need it."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The part of a job that one machine runs, and where its ranks meet the others."""

    nproc: int
    """Number of ranks on this machine."""
    first_rank: int = 0
    """Rank of the first of them."""
    world_size: int
    """Number of ranks on all machines."""
    node_rank: int = 0
    """Number of this machine, from 0."""
    master_addr: str = "127.0.0.1"
    """Address of the machine of rank 0, as the others see it."""
    master_port: int
    """TCP port on which rank 0 will listen."""
    interface: str | None
    """Name of the network interface for gloo; None leaves the choice to gloo."""


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """The processes of one job on this machine."""

    command: tuple[str, ...]
    """The command, the same for every rank except for LOCAL_RANK."""
    environs: tuple[Mapping[str, str], ...]
    """One environment per rank."""
    reason: str
    """Reason for the number of ranks, shown at the start."""
    first_rank: int = 0
    """Rank of the first process."""
    cores: tuple[tuple[int, ...], ...] = ()
    """For each rank, the numbers of the cores to which it is bound; empty if they are not bound."""

    def cores_of(self, local_rank: int) -> tuple[int, ...]:
        """Returns the cores of one rank; none if it is not bound."""
        return self.cores[local_rank] if self.cores else ()

    def command_of(self, local_rank: int) -> tuple[str, ...]:
        """Returns the command of one rank."""
        return tuple(LOCAL_RANK.format(local_rank) if word == LOCAL_RANK else word for word in self.command)

    @property
    def num_ranks(self) -> int:
        """Number of processes."""
        return len(self.environs)


def choose_nproc(wish: int | None, num_accelerators: int, cores: int) -> tuple[int, str]:
    """Returns the number of ranks and the reason: `wish`, else one per accelerator, else two (one on a single core)."""
    if wish is not None:
        if wish < 1:
            raise LaunchError(f"--nproc {wish}: at least one process is required")
        return wish, "as set by --nproc"
    if num_accelerators:
        return num_accelerators, "one for each accelerator"
    return min(2, cores), "no accelerator found: CPU processes; --nproc sets another number"


def make_plan(
    *,
    python: str | None,
    target: Sequence[str],
    part: Part,
    reason: str = "",
    environ: Mapping[str, str],
    cores: int,
) -> LaunchPlan:
    """Makes the commands and environments of the ranks of one machine.

    python: the interpreter; None if the target is a program.
    target: arguments of the interpreter: a script with its arguments, or "-m", a module and its arguments.
    cores: usable cores of this machine, divided among the ranks' OpenMP threads.
    """
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores // part.nproc)),  # more threads than cores make every rank slower
        "PYTHONUNBUFFERED": "1",  # unbuffered, so that the last output of a rank that dies is not lost
        "PYTHONFAULTHANDLER": "1",  # prints a stack for crashes in native code
    }
    if part.interface is not None:
        # Otherwise gloo resolves the name of the host, which fails on machines whose name cannot be resolved.
        defaults["GLOO_SOCKET_IFNAME"] = part.interface
    shared = {
        **defaults,
        **environ,
        "WORLD_SIZE": str(part.world_size),
        "LOCAL_WORLD_SIZE": str(part.nproc),
        "GROUP_RANK": str(part.node_rank),  # torchrun's name for the number of the machine
        "MASTER_ADDR": part.master_addr,
        "MASTER_PORT": str(part.master_port),
        "DS_LAUNCHER": "ds run",  # read by ds_comm, for the table at the start and for errors
    }
    return LaunchPlan(
        command=(*([python] if python else []), *target),
        environs=tuple(
            {**shared, "RANK": str(part.first_rank + local_rank), "LOCAL_RANK": str(local_rank)}
            for local_rank in range(part.nproc)
        ),
        reason=reason,
        first_rank=part.first_rank,
    )


def bind_cores(plan: LaunchPlan, cores: Sequence[int], *, keep_threads: bool) -> LaunchPlan:
    """Returns the plan with each rank bound to an equal part of `cores`, neighbours together.

    keep_threads: the user has set the number of threads; else it is the number of cores of a rank.

    Raises LaunchError if there are fewer cores than ranks.
    """
    count = len(cores) // plan.num_ranks
    if count == 0:
        raise LaunchError(
            f"{plan.num_ranks} ranks cannot be bound to {len(cores)} cores ({', '.join(map(str, cores))}): start fewer "
            "ranks, or do not bind them"
        )
    threads = {} if keep_threads else {"OMP_NUM_THREADS": str(count)}
    return dataclasses.replace(
        plan,
        environs=tuple({**environ, **threads} for environ in plan.environs),
        cores=tuple(tuple(cores[start : start + count]) for start in range(0, count * plan.num_ranks, count)),
    )


def parse_cores(text: str, usable: Sequence[int]) -> list[int]:
    """Returns the cores of a list such as "0-3,8"; all usable ones if it is empty.

    Raises LaunchError if a core does not exist, or is not usable for this process.
    """
    if not text:
        return list(usable)
    cores: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.strip().isdigit() or not (last or first).strip().isdigit():
            raise LaunchError(f"{text!r} is not a list of cores: write numbers and ranges, such as 0-3,8")
        cores += range(int(first), int(last or first) + 1)
    missing = sorted(set(cores) - set(usable))
    if missing or not cores:
        raise LaunchError(f"cores {text}: {missing or 'none'} cannot be used; usable are {list(usable)}")
    return list(dict.fromkeys(cores))


def refuse_nesting(environ: Mapping[str, str]) -> None:
    """Raises LaunchError under srun or mpirun, each task of which would start a separate job."""
    for name, launcher in (
        ("SLURM_STEP_NUM_TASKS", "srun"),
        ("OMPI_COMM_WORLD_SIZE", "mpirun"),
        ("PMI_SIZE", "mpiexec"),
    ):
        count = environ.get(name, "")
        if count.isdigit() and int(count) > 1:
            raise LaunchError(
                f"`ds run` starts all ranks itself, but {launcher} has already started {count} "
                f"processes ({name}={count}), each of which would start a separate job: run the script directly "
                f"with {launcher} (`{launcher} python script.py`), or unset {name}"
            )
