"""The command `deepspeed`, on top of `ds run`."""

from __future__ import annotations

import argparse
import base64
import dataclasses
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ds_compat.launch import scheduled
from ds_engine.launch.hosts import Pool, fetch_hostfile, parse_resource_filter, read_env_files
from ds_engine.launch.machine import core_numbers
from ds_engine.launch.network import is_this_machine
from ds_engine.launch.plan import LOCAL_RANK, LaunchError, bind_cores, parse_cores
from ds_engine.tune.script import tune_script

if TYPE_CHECKING:
    from ds_engine.launch.console import Console
    from ds_engine.launch.remote.job import JobPlan
    from ds_engine.launch.restart import Restarts

DLTS_HOSTFILE = "/job/hostfile"
EXPORT_ENVS = ["MLFLOW", "PYTHON", "MV2", "UCX"]
DEEPSPEED_ENVIRONMENT_NAME = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
_LAUNCHERS = frozenset({"pdsh", "ssh"})
_ELASTIC_RESTARTS = 100
"""Maximum number of restarts of an elastic job, as in DeepSpeed."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deepspeed",
        description="Starts a script on every rank of a job (ds-compat, on top of `ds run`).",
    )
    add = parser.add_argument
    add("-H", "--hostfile", default=DLTS_HOSTFILE, help="lines such as `worker-0 slots=4`")
    add(
        "-i",
        "--include",
        default="",
        help="NODE[:SLOT[,SLOT]...][@NODE...]: use only these, e.g. localhost:0,2",
    )
    add("-e", "--exclude", default="", help="use all except these, in the same form")
    add("--num_nodes", type=int, default=-1, help="use only the first machines of the host file")
    add(
        "--num_gpus",
        "--num_accelerators",
        type=int,
        default=-1,
        help="number of ranks on each machine",
    )
    add("--master_port", type=int, default=None, help="port of rank 0; default: a free port")
    add("--master_addr", default="", help="address of rank 0's machine, as the others see it")
    add("--node_rank", type=int, default=-1, help="with --no_ssh: number of this machine in the host file")
    add(
        "--launcher",
        default="pdsh",
        help="ssh or pdsh: the machines of the host file are started over ssh; openmpi, mpich, impi, mvapich or "
        "slurm: mpirun or srun starts the ranks",
    )
    add("--launcher_args", default="", help="further arguments of ssh, mpirun or srun")
    add("--ssh_port", type=int, default=None, help="port of the ssh servers")
    add(
        "--no_ssh",
        action="store_true",
        help="start only this machine's ranks; run the command on every machine",
    )
    add("--force_multi", action="store_true", help="connect to a single machine, too")
    add("--venv_script", default=None, help="shell script that each machine reads before it starts ranks")
    add("--enable_each_rank_log", default=None, help="folder for a file with the output of each rank")
    add("--module", action="store_true", help="the script is the name of a module, as with python -m")
    add("--no_python", action="store_true", help="the script is a program")
    add("--no_local_rank", action="store_true", help="do not pass --local_rank=N to the script")
    add(
        "--bind_cores_to_rank",
        action="store_true",
        help="bind each rank to an equal part of a machine's cores",
    )
    add("--bind_core_list", default=None, help="the cores to divide, such as 0-3,8")
    _add_elastic_options(parser)
    for name in ("no_ssh_check", "save_pid"):
        add(f"--{name}", action="store_true", help=argparse.SUPPRESS)
    add("--log_level", default=None, help=argparse.SUPPRESS)
    add("--autotuning", default="", choices=["", "tune", "run"], help=argparse.SUPPRESS)
    add("-q", "--quiet", action="store_true", help="print nothing at the start")
    add("user_script", help="the script, followed by its arguments")
    add("user_args", nargs=argparse.REMAINDER)
    return parser


def _add_elastic_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--elastic_training",
        action="store_true",
        help=f"start the job again after a failure, up to {_ELASTIC_RESTARTS} times, without machines that were lost",
    )
    add("--min_elastic_nodes", type=int, default=-1, help="smallest number of machines of an elastic job (1)")
    add("--max_elastic_nodes", type=int, default=-1, help="largest number; the others are spares (all)")


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line of DeepSpeed's launcher."""
    return _parser().parse_args(args)


def main(args: Sequence[str] | None = None) -> None:
    """The console script. Exits with the code of the rank that failed first, or 2."""
    options = parse_args(args)
    if args is not None:
        _pool(options)  # callers from Python get the ValueError, a shell gets its text
    sys.exit(launch(options))


def launch(options: argparse.Namespace) -> int:
    """Runs the job, and returns the exit code."""
    try:
        _refuse_what_is_not_here(options)
        if scheduled.starts_ranks(options.launcher):
            exported = scheduled.exported_variables(os.environ, EXPORT_ENVS)
            exported |= read_env_files(DEEPSPEED_ENVIRONMENT_NAME)
            return scheduled.launch(options, _pool, exported, _say)
        pool = _pool(options)
        if options.autotuning:
            return tune_script(options.autotuning, options.user_script, options.user_args, pool, _say)
        if len(pool) > 1 or options.force_multi or options.no_ssh or not is_this_machine(next(iter(pool))):
            return _launch_on_machines(options, pool)
        return _launch_here(options, next(iter(pool.values())))
    except ValueError as error:  # also LaunchError
        _say(f"cannot start: {error}")
        return 2


def _launch_here(options: argparse.Namespace, slots: Sequence[int]) -> int:
    from ds_engine.launch import local
    from ds_engine.launch.restart import job_name, restart_environ, run_again
    from ds_engine.launch.supervise import Outcome, run

    restarts, name = _restarts(options), job_name(os.environ)
    environ = {**os.environ, **read_env_files(DEEPSPEED_ENVIRONMENT_NAME), "LOCAL_SIZE": str(len(slots))}
    if options.include or options.exclude:
        environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, slots))

    def start(number: int) -> Outcome:
        plan = local.prepare(
            options.user_script,
            _arguments(options),
            nproc=len(slots),
            module=options.module,
            program=options.no_python,
            port=options.master_port,
            environ={**environ, **restart_environ(name, number)},
        )
        if (cores := _cores(options)) is not None:
            keep = "OMP_NUM_THREADS" in environ
            plan = bind_cores(plan, parse_cores(cores, core_numbers()), keep_threads=keep)
        console = _console(options, inherit=True)
        if not options.quiet:
            _say(f"{plan.num_ranks} rank(s): {options.user_script} {' '.join(options.user_args)}".rstrip())
        return run(plan, say=_say, console=console, is_last=number >= restarts.limit)

    return run_again(start, restarts, _say).code


def _launch_on_machines(options: argparse.Namespace, pool: Pool) -> int:
    from ds_engine.launch.copies import JOB
    from ds_engine.launch.remote.connect import Watch, run_on_hosts
    from ds_engine.launch.remote.prepare import plan_share
    from ds_engine.launch.remote.transport import Transport, split_arguments
    from ds_engine.launch.restart import Candidates, job_name, restart_environ, run_again
    from ds_engine.launch.supervise import Outcome, run

    if options.no_ssh:
        # The launchers of the machines do not know each other: only the user can give the job one name.
        again = restart_environ(os.environ.get(JOB, ""), 0)
        plan = plan_share(_job(options, pool, pool, again), options.node_rank)
        return run(plan, say=_say, console=_console(options, inherit=True)).code
    transport = Transport(
        port=options.ssh_port,
        arguments=split_arguments(options.launcher_args),
        activate=options.venv_script,
    )
    restarts, name = _restarts(options), job_name(os.environ)
    most = options.max_elastic_nodes if options.elastic_training and options.max_elastic_nodes > 0 else None
    candidates = Candidates(pool, most, restarts, _say)

    def start(number: int) -> Outcome:
        def attempt(chosen: Pool) -> Outcome:
            is_last = number >= restarts.limit
            watch = Watch(say=_say, console=_console(options, inherit=False), is_last=is_last)
            job = _job(options, pool, chosen, restart_environ(name, number))
            return run_on_hosts(job, transport, watch)

        return candidates.attempt(attempt)

    return run_again(start, restarts, _say).code


def _job(options: argparse.Namespace, pool: Pool, chosen: Pool, again: Mapping[str, str]) -> JobPlan:
    """Plans the job on the chosen machines of a pool. again: the variables of `restart_environ`."""
    from ds_engine.launch.remote.prepare import Script, plan_job

    kind = "module" if options.module else "program" if options.no_python else "script"
    job = plan_job(
        Script(name=options.user_script, arguments=_arguments(options), kind=kind),
        chosen,
        # The address that was given is that of the first machine of the file.
        master_addr=options.master_addr if next(iter(chosen)) == next(iter(pool)) else "",
        master_port=options.master_port,
        environ={**os.environ, **again},
        env_file=DEEPSPEED_ENVIRONMENT_NAME,
    )
    return dataclasses.replace(job, bind=_cores(options))


def _restarts(options: argparse.Namespace) -> Restarts:
    from ds_engine.launch.restart import Restarts

    if not options.elastic_training:
        return Restarts()
    return Restarts(limit=_ELASTIC_RESTARTS, min_nodes=max(1, options.min_elastic_nodes))


def _cores(options: argparse.Namespace) -> str | None:
    """Returns the cores to which ranks are bound: "" for all; None if they are not bound."""
    listed: str | None = options.bind_core_list
    return listed or "" if listed or options.bind_cores_to_rank else None


def _arguments(options: argparse.Namespace) -> list[str]:
    return [*([] if options.no_local_rank else [LOCAL_RANK]), *options.user_args]


def _console(options: argparse.Namespace, *, inherit: bool) -> Console:
    from ds_engine.launch.console import Console, make_log_folder

    folder = options.enable_each_rank_log
    if folder is None or folder == "None":
        return Console(_say, inherit=inherit)
    logs = make_log_folder(folder, options.user_script)
    _say(f"the output of each rank is in {logs}")
    return Console(_say, logs=logs, only_rank_0=True, inherit=inherit)


def _refuse_what_is_not_here(options: argparse.Namespace) -> None:
    by_scheduler = scheduled.starts_ranks(options.launcher)
    if options.launcher.lower() not in _LAUNCHERS and not by_scheduler:
        raise LaunchError(
            f"--launcher {options.launcher}: `ssh` and `pdsh` are possible, which start the machines over ssh, and "
            "`openmpi`, `mpich`, `impi`, `mvapich` and `slurm`, which start the ranks by mpirun or srun"
        )
    if options.save_pid and not by_scheduler:
        _say("--save_pid has no effect: the summary names the process ids of ranks")


def _pool(options: argparse.Namespace) -> Pool:
    """Returns the machines and slots of the job."""
    filtered = bool(options.include or options.exclude)
    if filtered and (options.num_gpus > 0 or options.num_nodes > 0):
        raise ValueError("Cannot specify num_nodes/num_gpus with include/exclude")
    if options.module and options.no_python:
        raise ValueError("--no_python and --module are mutually exclusive")
    if options.num_gpus == 0 or options.num_gpus < -1:
        raise ValueError(
            f"--num_gpus {options.num_gpus}: at least 1 rank is required; leave it out to use all devices"
        )
    listed = fetch_hostfile(options.hostfile)
    if listed is None and options.hostfile != DLTS_HOSTFILE:
        raise ValueError(f"--hostfile {options.hostfile}: there is no such file")
    if listed is None and options.num_nodes > 1:
        raise LaunchError(f"--num_nodes {options.num_nodes}: name the machines in a host file (--hostfile)")
    pool = listed or {"localhost": list(range(_devices(options)))}
    if options.num_nodes > len(pool):
        raise LaunchError(f"--num_nodes {options.num_nodes}: {options.hostfile} names {len(pool)} machines")
    pool = parse_resource_filter(pool, options.include, options.exclude)
    if not pool:
        raise LaunchError("--include/--exclude leave no slot")
    if options.num_nodes > 0:
        pool = dict(list(pool.items())[: options.num_nodes])
    if len(pool) > 1 and any(options.num_gpus > len(slots) for slots in pool.values()):
        raise LaunchError(f"--num_gpus {options.num_gpus}: {options.hostfile} gives a machine fewer slots")
    if options.num_gpus > 0:
        pool = {host: list(range(options.num_gpus)) for host in pool}
    return pool


def _devices(options: argparse.Namespace) -> int:
    """Returns the number of accelerators of this machine; without any, --num_gpus or LOCAL_SIZE, else the number of
    NUMA nodes.
    """
    from ds_engine.launch.devices import count_accelerators

    if options.num_gpus > 0:
        return int(options.num_gpus)
    named = [int(n) for n in re.findall(r"\d+", (options.include or options.exclude).partition(":")[2])]
    nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))
    on_cpu = int(os.environ.get("LOCAL_SIZE", "0")) or max([1, nodes, *(n + 1 for n in named)])
    return count_accelerators() or on_cpu


def _say(line: str) -> None:
    sys.stderr.write(f"[deepspeed] {line}\n")
    sys.stderr.flush()


def parse_inclusion_exclusion(resource_pool: Mapping[str, int], inclusion: str, exclusion: str) -> Pool:
    """As `parse_resource_filter`, for numbers of slots."""
    return parse_resource_filter({h: list(range(n)) for h, n in resource_pool.items()}, inclusion, exclusion)


def encode_world_info(world_info: Mapping[str, list[int]]) -> str:
    """Hosts and slots as one word."""
    return base64.urlsafe_b64encode(json.dumps(dict(world_info)).encode()).decode()


if __name__ == "__main__":
    main()
