"""`deepspeed.launcher.launch`: starts the ranks of one machine of a job, as pdsh needs it."""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ds_engine.launch.local import check_exists, target_of
from ds_engine.launch.machine import usable_cores
from ds_engine.launch.network import interface_towards
from ds_engine.launch.plan import LOCAL_RANK, LaunchError, LaunchPlan, Part, make_plan


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line of one machine's launcher."""
    parser = argparse.ArgumentParser(
        prog="deepspeed.launcher.launch", description="Starts the ranks of one machine (ds-compat)."
    )
    add = parser.add_argument
    add("--node_rank", type=int, default=0, help="number of this machine, from 0")
    add("--master_addr", default="127.0.0.1", help="address of the machine of rank 0")
    add("--master_port", type=int, default=29500, help="port on which rank 0 listens")
    add("--world_info", default="None", help="hosts and slots, as encode_world_info returns them")
    add("--module", action="store_true", help="the script is the name of a module, as with python -m")
    add("--no_python", action="store_true", help="the script is a program")
    add("--no_local_rank", action="store_true", help="do not pass --local_rank=N to the script")
    add("--enable_each_rank_log", default="None", help="folder for a file with the output of each rank")
    add("training_script", help="the script, followed by its arguments")
    add("training_script_args", nargs=argparse.REMAINDER)
    return parser.parse_args(args)


def decode_world_info(text: str) -> dict[str, list[int]]:
    """Returns hosts and slots; the reverse of `encode_world_info`.

    Raises:
        LaunchError: the text is something else.
    """
    try:
        world: Any = json.loads(base64.urlsafe_b64decode(text))
        return {
            str(host): list(range(s)) if isinstance(s, int) else [*map(int, s)] for host, s in world.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise LaunchError(
            f"--world_info {text!r} is not what encode_world_info returns ({error}): it is a JSON object of hosts and "
            "slots in URL-safe base64"
        ) from None


def plan(options: argparse.Namespace, environ: Mapping[str, str]) -> LaunchPlan:
    """Plans the ranks of this machine.

    Raises:
        LaunchError: the options contradict each other, or the script does not exist.
    """
    world = decode_world_info(options.world_info)
    hosts = list(world)
    if not 0 <= options.node_rank < len(hosts):
        raise LaunchError(
            f"--node_rank {options.node_rank}: --world_info names {len(hosts)} machine(s), so it must be from 0 to "
            f"{len(hosts) - 1}"
        )
    if options.module and options.no_python:
        raise LaunchError("--no_python and --module exclude each other: remove one of them")
    check_exists(options.training_script, options.module, options.no_python)
    slots = world[hosts[options.node_rank]]
    arguments = [*([] if options.no_local_rank else [LOCAL_RANK]), *options.training_script_args]
    return make_plan(
        python=None if options.no_python else sys.executable,
        target=target_of(options.training_script, arguments, module=options.module, config=None),
        part=Part(
            nproc=len(slots),
            first_rank=sum(len(world[host]) for host in hosts[: options.node_rank]),
            world_size=sum(map(len, world.values())),
            node_rank=options.node_rank,
            master_addr=options.master_addr,
            master_port=options.master_port,
            interface=interface_towards(options.master_addr),
        ),
        reason=f"machine {options.node_rank} of {len(hosts)}",
        environ={**environ, "LOCAL_SIZE": str(len(slots)), "CUDA_VISIBLE_DEVICES": ",".join(map(str, slots))},
        cores=usable_cores(),
    )


def main(args: Sequence[str] | None = None) -> None:
    """Starts the ranks of this machine; exits with the code of the one that failed first, or 2."""
    from ds_engine.launch.console import Console, make_log_folder
    from ds_engine.launch.supervise import run

    options = parse_args(args)
    try:
        planned = plan(options, os.environ)
        logs = options.enable_each_rank_log
        folder = make_log_folder(logs, options.training_script) if logs != "None" else None
    except (LaunchError, OSError) as error:
        _say(f"cannot start: {error}")
        sys.exit(2)
    console = Console(_say, logs=folder, only_rank_0=False, inherit=False)
    sys.exit(run(planned, say=_say, console=console).code)


def _say(line: str) -> None:
    sys.stderr.write(f"[deepspeed] {line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
