"""A private Slurm for as long as a test needs it: no root account, no munge, ports of its own.

It has one node, or one on each of several hosts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from harness.hosts import Host

PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "sinfo")
_START_S = 30.0


def missing() -> list[str]:
    """Programs that this machine lacks for it."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


@contextlib.contextmanager
def cluster(folder: Path, hosts: Sequence[Host] = ()) -> Iterator[dict[str, str]]:
    """Starts the daemons; yields what the environment needs for srun and sbatch to find them.

    hosts: each becomes a node; the first has the controller. Without any, this machine is the only node.
    """
    here = socket.gethostname().split(".")[0]
    addresses = {host.name: host.address for host in hosts} or {here: "127.0.0.1"}
    environ = {"PATH": _path(), "SLURM_CONF": str(_configure(folder, addresses))}
    inside = [host.inside for host in hosts] or [[]]
    with contextlib.ExitStack() as stack:
        for number, command in enumerate(
            [[*inside[0], "slurmctld"], *([*words, "slurmd"] for words in inside)]
        ):
            log = stack.enter_context((folder / f"{command[-1]}{number}.out").open("wb"))
            process = subprocess.Popen(
                [*command, "-D"], env={**os.environ, **environ}, stdout=log, stderr=log
            )
            stack.callback(_stop, process)
        deadline = time.monotonic() + _START_S
        while _state(inside[0], environ) != "idle":
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text() for path in folder.glob("*.out"))
                raise RuntimeError(f"nodes are {_state(inside[0], environ)!r} after {_START_S:g} s:\n{logs}")
            time.sleep(0.2)
        yield environ


def _configure(folder: Path, addresses: Mapping[str, str]) -> Path:
    (folder / "state").mkdir(parents=True)
    (folder / "spool").mkdir()
    controller, *_ = addresses
    nodes = "\n".join(
        f"NodeName={name} NodeAddr={address} CPUs={os.cpu_count()} RealMemory=1000 State=UNKNOWN"
        for name, address in addresses.items()
    )
    user = "root" if os.getuid() == 0 else os.environ.get("USER", "")
    path = folder / "slurm.conf"
    path.write_text(f"""
ClusterName=test
SlurmctldHost={controller}({addresses[controller]})
SlurmctldPort={_free_port()}
SlurmdPort={_free_port()}
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
""")
    return path


def _path() -> str:
    return os.pathsep.join(
        [os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]
    )  # daemons stand outside users' PATH


def _state(inside: Sequence[str], environ: dict[str, str]) -> str:
    command = [*inside, "sinfo", "--noheader", "-o", "%t"]
    done = subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
