"""`ds_comm.start` on two hosts, under Open MPI, MPICH and Slurm: ranks are placed, and add numbers over the network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from comm import slurm
from harness.hosts import Network

_SCRIPT = """
import socket, torch, torch.distributed as dist, ds_comm
torch.set_num_threads(1)
world = ds_comm.start(device="cpu", timeout_s=60)
x = torch.tensor(10.0 ** world.rank)
dist.all_reduce(x)
print(f"<{world.rank} of {world.world_size}, local {world.local_rank} of {world.local_size}, "
      f"{world.source} on {socket.gethostname()}: {x.item():g}>", flush=True)
dist.destroy_process_group()
"""
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _run(network: Network, folder: Path, *command: str, **environ: str) -> str:
    """Runs a command on host-a, and returns what it printed."""
    (folder / "script.py").write_text(_SCRIPT)
    kept = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
    done = subprocess.run(
        [*network["host-a"].inside_folder(folder), *command],
        env={**kept, **environ},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def _placed(source: str) -> list[str]:
    return [
        f"<{rank} of 2, local 0 of 1, {source} on {host}: 11>"
        for rank, host in enumerate(("host-a", "host-b"))
    ]


def _ssh(network: Network, folder: Path) -> str:
    """A program that is ssh with the key of this network."""
    program = folder / "ssh"
    program.write_text(f'#!/bin/sh\nexec /usr/bin/ssh {network.ssh_arguments} "$@"\n')
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize("launcher", ["mpirun.openmpi", "mpiexec.hydra"])
def test_under_mpi(launcher: str, network: Network, tmp_path: Path) -> None:
    if shutil.which(launcher) is None:
        pytest.skip(f"needs {launcher} (Debian packages openmpi-bin and mpich)")
    ssh = _ssh(network, tmp_path)
    options = {
        "mpirun.openmpi": f"--allow-run-as-root --host host-a:1,host-b:1 --mca plm_rsh_agent {ssh} "
        "-x MASTER_ADDR=host-a -n 2",
        "mpiexec.hydra": f"-launcher ssh -launcher-exec {ssh} -hosts host-a,host-b -ppn 1 "
        "-genv MASTER_ADDR host-a -n 2",
    }[launcher]
    out = _run(network, tmp_path, launcher, *options.split(), sys.executable, str(tmp_path / "script.py"))
    for line in _placed("mpi"):
        assert line in out


def test_under_slurm(network: Network, tmp_path: Path) -> None:
    if slurm.missing():
        pytest.skip(f"needs {', '.join(slurm.missing())} (Debian package slurm-wlm)")
    hosts = [network["host-a"], network["host-b"]]
    with slurm.cluster(tmp_path / "slurm", hosts) as environ:
        out = _run(network, tmp_path, "srun", "-N", "2", "-n", "2", sys.executable, "script.py", **environ)
    for line in _placed("slurm"):
        assert line in out
