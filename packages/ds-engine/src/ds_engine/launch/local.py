"""`ds run`: runs a job on this machine."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ds_engine.launch.devices import count_accelerators
from ds_engine.launch.machine import usable_cores
from ds_engine.launch.network import free_port, loopback_interface
from ds_engine.launch.plan import LaunchError, LaunchPlan, Part, choose_nproc, make_plan, refuse_nesting
from ds_engine.launch.supervise import Patience, run


def launch(
    script: str,
    arguments: Sequence[str],
    *,
    nproc: int | None = None,
    module: bool = False,
    config: str | None = None,
    say: Callable[[str], None],
    patience: Patience | None = None,
) -> int:
    """Runs `script` on `nproc` ranks of this machine, and returns the exit code.

    nproc: None: one per accelerator, or two CPU processes.
    module: `script` is the name of a module, as with `python -m`.
    config: a configuration file, passed to the script as `--config FILE` before its own arguments.

    Raises LaunchError, before anything is started, if the job cannot run.
    """
    plan = prepare(script, arguments, nproc=nproc, module=module, config=config)
    say(f"{plan.num_ranks} rank{'s' * (plan.num_ranks > 1)} ({plan.reason}): {' '.join(plan.command[1:])}")
    return run(plan, say=say, patience=patience).code


def prepare(
    script: str,
    arguments: Sequence[str],
    *,
    nproc: int | None,
    module: bool = False,
    program: bool = False,
    config: str | None = None,
    port: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> LaunchPlan:
    """Inspects the machine and makes the launch plan; see `launch`.

    program: `script` is a program, not a Python file.
    port: the port on which rank 0 listens; None: a free one.
    environ: environment to use instead of this process's.
    """
    environ = os.environ if environ is None else environ
    refuse_nesting(environ)
    check_exists(script, module, program)
    check_config(config)
    cores = usable_cores()
    count, reason = choose_nproc(nproc, 0 if nproc is not None else count_accelerators(), cores)
    return make_plan(
        python=None if program else sys.executable,
        target=target_of(script, arguments, module=module, config=config),
        part=Part(
            nproc=count,
            world_size=count,
            master_port=port if port is not None else free_port(),
            interface=loopback_interface(),
        ),
        reason=reason,
        environ=environ,
        cores=cores,
    )


def target_of(script: str, arguments: Sequence[str], *, module: bool, config: str | None) -> list[str]:
    """Returns the arguments of the interpreter."""
    return [
        *(["-m"] if module else []),
        script,
        *(["--config", config] if config is not None else []),
        *arguments,
    ]


def check_config(config: str | None) -> None:
    """Raises LaunchError if the configuration file does not exist."""
    if config is not None and not Path(config).is_file():
        raise LaunchError(
            f"--config {config}: there is no such file in {Path.cwd()}; arguments after the script's name "
            "are passed to the script"
        )


def check_exists(script: str, module: bool, program: bool) -> None:
    """Raises LaunchError if the script, module or program does not exist on this machine."""
    if program:
        if shutil.which(script) is None:
            raise LaunchError(f"there is no program {script!r} on the PATH")
        return
    if module:
        sys.path.insert(0, os.getcwd())  # `python -m` searches this directory first
        try:
            exists = importlib.util.find_spec(script) is not None
        except ModuleNotFoundError:
            exists = False
        finally:
            sys.path.pop(0)
        if not exists:
            raise LaunchError(
                f"there is no module {script!r} for {sys.executable}: is its package installed there?"
            )
        return
    if not Path(script).is_file():
        hint = "; options of `ds run` must come before the script" if script.startswith("-") else ""
        near = (
            sorted(path.name for path in Path(script).parent.glob("*.py"))[:5]
            if Path(script).parent.is_dir()
            else []
        )
        there = f" (there: {', '.join(near)})" if near else ""
        raise LaunchError(
            f"there is no file {script!r} in {Path.cwd()}{there}{hint}; use --module for a module's name"
        )
