"""`deepspeed --launcher openmpi|mpich|impi|mvapich|slurm`: runs the command of a runner in place of this process."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from ds_compat.launch.runners import SCHEDULERS, OpenMPIRunner, SchedulerRunner
from ds_engine.launch.hosts import Pool
from ds_engine.launch.plan import LaunchError

_OPEN_MPI = frozenset({"mpirun.openmpi", "orterun", "prterun"})
_HYDRA = frozenset({"mpirun.mpich", "mpiexec.hydra", "mpiexec.mpich", "mpirun.hydra"})
"""Names of programs behind the link `mpirun`."""
_OURS = ("no_ssh", "force_multi", "venv_script", "enable_each_rank_log")
"""Options of a launcher that starts ranks itself."""


def starts_ranks(launcher: str) -> bool:
    """Whether --launcher names a program that starts every rank itself."""
    return launcher.lower() in SCHEDULERS


def launch(
    options: argparse.Namespace,
    pool_of: Callable[[argparse.Namespace], Pool],
    exported: Mapping[str, str],
    say: Callable[[str], None],
) -> int:
    """Replaces this process by mpirun or srun, so that signals and the exit code are theirs.

    Args:
        pool_of: reads hosts and slots from a host file.
        exported: variables for every rank.

    Raises:
        LaunchError: the program is not on the PATH, or cannot follow an option.
        ValueError: likewise, or the host file is malformed.
    """
    words, environ = command(options, pool_of, exported)
    if not options.quiet:
        say(shlex.join(words))
    os.execvpe(words[0], words, environ)


def command(
    options: argparse.Namespace, pool_of: Callable[[argparse.Namespace], Pool], exported: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Returns the command and its environment; arguments and errors as for `launch`."""
    from ds_compat.launch.launcher import encode_world_info

    kind = SCHEDULERS[options.launcher.lower()]
    ours = [f"--{name}" for name in _OURS if getattr(options, name)]
    if ours:
        raise LaunchError(
            f"--launcher {options.launcher} cannot follow {' and '.join(ours)}, because {kind.program} starts the "
            f"ranks: pass the options of {kind.program} for it in --launcher_args"
        )
    pool = _allocated(options) or pool_of(options)
    runner = kind(options, encode_world_info(pool), pool)
    if not runner.backend_exists():
        raise LaunchError(
            f"--launcher {options.launcher} needs {kind.needs}, which the PATH of this machine does not have: install "
            "it, load its module, or take another launcher"
        )
    _refuse_another_mpi(kind)
    for name, value in exported.items():
        runner.add_export(name, value)
    environ = dict(os.environ)
    return runner.get_cmd(environ, pool), environ


def _refuse_another_mpi(kind: type[SchedulerRunner]) -> None:
    """Raises LaunchError if mpirun is known to belong to another MPI, whose options differ."""
    program = shutil.which(kind.program)
    real = Path(program).resolve() if program is not None else Path()
    open_mpi, hydra = real.name in _OPEN_MPI, real.name in _HYDRA
    if (kind is OpenMPIRunner and hydra) or (kind is not OpenMPIRunner and open_mpi):
        raise LaunchError(
            f"mpirun is {real}, which belongs to {'Open MPI' if open_mpi else 'MPICH'}: --launcher {kind.label} needs "
            f"{kind.needs}, first on the PATH"
        )


def exported_variables(environ: Mapping[str, str], prefixes: list[str]) -> dict[str, str]:
    """Returns the variables whose names begin with one of the prefixes."""
    return {name: value for name, value in environ.items() if name.startswith(tuple(prefixes))}


def _allocated(options: argparse.Namespace) -> Pool | None:
    """Returns slots that Slurm gives to a job without a host file: as asked for, or as many as the allocation has
    tasks.
    """
    if options.launcher.lower() != "slurm" or Path(options.hostfile).is_file():
        return None
    if options.num_nodes > 0 and options.num_gpus > 0:
        return {f"machine {number}": list(range(options.num_gpus)) for number in range(options.num_nodes)}
    tasks = os.environ.get("SLURM_NTASKS", "")
    if tasks.isdecimal() and options.num_gpus == -1 and int(tasks) > 0:
        return {"the allocation": list(range(int(tasks)))}
    return None
