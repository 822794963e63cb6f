"""The command `deepspeed` for one machine, on top of `ds run`."""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ds_engine.launch.hosts import Pool, fetch_hostfile, parse_resource_filter, read_env_files
from ds_engine.launch.plan import LOCAL_RANK, LaunchError

DLTS_HOSTFILE = "/job/hostfile"
EXPORT_ENVS = ["MLFLOW", "PYTHON", "MV2", "UCX"]
DEEPSPEED_ENVIRONMENT_NAME = os.environ.get("DS_ENV_FILE", ".deepspeed_env")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deepspeed",
        description="Starts a script on every rank of this machine (ds-compat, on top of `ds run`).",
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
    add("--num_nodes", type=int, default=-1, help="must be 1: this launcher starts one machine")
    add(
        "--num_gpus",
        "--num_accelerators",
        type=int,
        default=-1,
        help="number of ranks",
    )
    add("--master_port", type=int, default=None, help="port of rank 0; default: a free port")
    add("--master_addr", default="", help="of no use on one machine")
    add("--node_rank", type=int, default=-1, help="of no use on one machine")
    add("--launcher", default="pdsh", help="for several machines: not here")
    add("--launcher_args", default="", help="for several machines: not here")
    add("--module", action="store_true", help="the script is the name of a module, as with python -m")
    add("--no_python", action="store_true", help="the script is a program")
    add("--no_local_rank", action="store_true", help="do not pass --local_rank=N to the script")
    for name in (
        "no_ssh",
        "no_ssh_check",
        "force_multi",
        "save_pid",
        "bind_cores_to_rank",
        "elastic_training",
    ):
        add(f"--{name}", action="store_true", help=argparse.SUPPRESS)
    for name in ("min_elastic_nodes", "max_elastic_nodes", "ssh_port"):
        add(f"--{name}", type=int, default=None, help=argparse.SUPPRESS)
    for name in ("enable_each_rank_log", "bind_core_list", "venv_script", "log_level"):
        add(f"--{name}", default=None, help=argparse.SUPPRESS)
    add("--autotuning", default="", choices=["", "tune", "run"], help=argparse.SUPPRESS)
    add("-q", "--quiet", action="store_true", help="print nothing at the start")
    add("user_script", help="the script, followed by its arguments")
    add("user_args", nargs=argparse.REMAINDER)
    return parser


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line of DeepSpeed's launcher."""
    return _parser().parse_args(args)


def main(args: Sequence[str] | None = None) -> None:
    """The console script. Exits with the code of the rank that failed first, or 2."""
    options = parse_args(args)
    if args is not None:
        _place(options)  # callers from Python get the ValueError, a shell gets its text
    sys.exit(launch(options))


def launch(options: argparse.Namespace) -> int:
    """Runs the job, and returns the exit code."""
    from ds_engine.launch import local
    from ds_engine.launch.supervise import run

    try:
        _refuse_what_is_not_here(options)
        ranks, environ = _place(options)
        arguments = [*([] if options.no_local_rank else [LOCAL_RANK]), *options.user_args]
        plan = local.prepare(
            options.user_script,
            arguments,
            nproc=ranks,
            module=options.module,
            program=options.no_python,
            port=options.master_port,
            environ=environ,
        )
    except (LaunchError, ValueError) as error:
        _say(f"cannot start: {error}")
        return 2
    if not options.quiet:
        _say(f"{plan.num_ranks} rank(s): {options.user_script} {' '.join(options.user_args)}".rstrip())
    return run(plan, say=_say)


def _refuse_what_is_not_here(options: argparse.Namespace) -> None:
    if options.num_nodes > 1 or options.node_rank > 0 or options.force_multi:
        raise LaunchError(
            "this launcher starts the ranks of one machine: on several machines, start the script with torchrun, "
            "srun or mpirun, which deepspeed.init_distributed supports"
        )
    if options.autotuning:
        raise LaunchError("--autotuning is not supported yet; ds-engine will add it")
    if options.elastic_training:
        raise LaunchError(
            "--elastic_training is not supported; a checkpoint can be loaded on any number of ranks"
        )
    if options.enable_each_rank_log:
        raise LaunchError(
            "--enable_each_rank_log is not supported: lines of rank 1 and up begin with their rank; use `tee`"
        )


def _place(options: argparse.Namespace) -> tuple[int, dict[str, str]]:
    """Returns (number of ranks, their environment)."""
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
    pool = listed or {"localhost": list(range(_devices(options)))}
    if len(pool) > 1 and not filtered:
        raise LaunchError(
            f"{options.hostfile} names {len(pool)} machines ({', '.join(pool)}): this launcher starts the ranks of "
            "one; use torchrun, srun or mpirun"
        )
    pool = parse_resource_filter(pool, options.include, options.exclude)
    if len(pool) != 1:
        raise ValueError(
            f"--include/--exclude leave {len(pool)} machines, but this launcher starts ranks on exactly one"
        )
    slots = next(iter(pool.values()))
    if options.num_gpus > 0:
        slots = list(range(options.num_gpus))
    environ = {**os.environ, **read_env_files(DEEPSPEED_ENVIRONMENT_NAME)}
    environ["LOCAL_SIZE"] = str(len(slots))
    if filtered:
        environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, slots))
    return len(slots), environ


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
