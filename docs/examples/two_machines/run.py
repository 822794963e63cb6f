"""Builds two hosts on this Linux machine, and trains on both with `ds run --hostfile`.

A host has a network, processes, a name and an ssh server of its own. Needs root and the Debian package openssh-server.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests"))

from harness import hosts  # noqa: E402  after the path is set

SCRIPT = ROOT / "docs" / "examples" / "plain_loop" / "train.py"
FAULTS = ("none", "kill", "unplug")


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """The command line; what it does not know is for the training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--slots", type=int, default=1, help="ranks on each host")
    parser.add_argument(
        "--fault",
        choices=FAULTS,
        default="none",
        help="kill: kill a rank on host-b; unplug: take its link down",
    )
    parser.add_argument("--after", type=float, default=20.0, help="seconds until the fault")
    return parser.parse_known_args()


def main() -> int:
    """Returns the exit code of the job."""
    args, more = arguments()
    lacks = hosts.missing()
    if lacks is not None:
        print(lacks, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder, hosts.network(Path(folder) / "network") as network:
        hostfile = Path(folder) / "hostfile"
        hostfile.write_text(f"host-a slots={args.slots}\nhost-b slots={args.slots}\n")
        command = [
            sys.executable,
            "-m",
            "ds_engine",
            "run",
            "--hostfile",
            str(hostfile),
            "--host-timeout",
            "10",
        ]
        command += [
            "--launcher-args",
            network.ssh_arguments,
            str(SCRIPT),
            "--checkpoints",
            f"{folder}/checkpoints",
        ]
        job = subprocess.Popen([*network["host-a"].inside_folder(SCRIPT.parent), *command, *more])
        if args.fault == "none":
            return job.wait()
        time.sleep(args.after)
        if args.fault == "unplug":
            with network["host-b"].unplugged():
                return job.wait()
        os.kill(network["host-b"].processes(str(SCRIPT))[0], signal.SIGKILL)
        return job.wait()


if __name__ == "__main__":
    sys.exit(main())
