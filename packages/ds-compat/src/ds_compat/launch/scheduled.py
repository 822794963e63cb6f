"""`deepspeed --launcher openmpi|mpich|impi|mvapich|slurm`: runs the command of a runner in place of this process."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable, Mapping, Sequence

from ds_compat.launch.runners import SCHEDULERS, Pool
from ds_engine.launch.plan import LaunchError


def command(
    options: argparse.Namespace, pool: Pool, world_info: str, exported: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Returns the command and its environment.

    Args:
        pool: hosts and slots.
        exported: variables for every rank.

    Raises:
        LaunchError: the program is not on the PATH.
        ValueError: the launcher cannot follow an option.
    """
    runner = SCHEDULERS[options.launcher](options, world_info, pool)
    if not runner.backend_exists():
        raise LaunchError(
            f"--launcher {options.launcher} needs {runner.needs}, which is not on the PATH of this machine: install it "
            "or load its module, or take another launcher"
        )
    for name, value in exported.items():
        runner.add_export(name, value)
    environ = dict(os.environ)
    return runner.get_cmd(environ, pool), environ


def become(words: Sequence[str], environ: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Replaces this process by the command, so that signals and the exit code are those of mpirun or srun."""
    say(shlex.join(words))
    os.execvpe(words[0], [*words], environ)
