"""`deepspeed --launcher` on two hosts: mpirun starts ranks on the other host over ssh, srun through slurmd."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from comm import slurm
from engine.launching import clean_environ, until
from harness.hosts import Network

SCRIPT = """
import os, socket, sys, torch, torch.distributed as dist, ds_comm
torch.set_num_threads(1)
world = ds_comm.start(device="cpu", timeout_s=60)
x = torch.tensor(10.0 ** world.rank)
dist.all_reduce(x)
place = f"local {world.local_rank} of {world.local_size} on {socket.gethostname()}"
shown = f"{x.item():g}, {sys.argv[1:]}, {os.environ.get('UCX_NOTE')}"
print(f"<{world.rank} of {world.world_size}, {place}, {shown}>", flush=True)
if "fail" in sys.argv and world.rank == 3:
    sys.exit(5)
dist.barrier()
"""
WORDS = ["two words", "it's $HOME", "%h;x"]
OPEN_MPI = "--allow-run-as-root --oversubscribe --bind-to none"


@pytest.fixture(params=["openmpi", "mpich"])
def launcher(request: pytest.FixtureRequest, network: Network, tmp_path: Path) -> list[str]:
    """The options of `deepspeed` for this MPI."""
    kind = request.param
    real = shutil.which(f"mpirun.{kind}")
    if real is None:
        pytest.skip(f"needs mpirun.{kind} (Debian package {'openmpi-bin' if kind == 'openmpi' else kind})")
    ssh = tmp_path / "bin" / "ssh-of-the-network"
    ssh.parent.mkdir()
    ssh.write_text(f'#!/bin/sh\nexec ssh {network.ssh_arguments} "$@"\n')
    mpirun = ssh.parent / "mpirun"
    mpirun.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    for program in (ssh, mpirun):
        program.chmod(0o755)
    options = (
        f"{OPEN_MPI} --mca plm_rsh_agent {ssh}"
        if kind == "openmpi"
        else f"-launcher ssh -launcher-exec {ssh}"
    )
    return ["--launcher", kind, "--launcher_args", options]


def started(
    network: Network, folder: Path, launcher: list[str], *arguments: str, **more: str
) -> subprocess.CompletedProcess[str]:
    (folder / "my script.py").write_text(SCRIPT)
    (folder / "hosts").write_text("host-a slots=2\nhost-b slots=2\n")
    environ = {**clean_environ(), "UCX_NOTE": "a b;c", "PYTHONDONTWRITEBYTECODE": "1"}
    environ |= {"PATH": f"{folder}/bin:{environ['PATH']}", **more}
    command = [sys.executable, "-m", "ds_compat.launch.launcher", "--hostfile", "hosts", *launcher]
    return subprocess.run(
        [*network["host-a"].inside_folder(folder), *command, "my script.py", *arguments],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )


def check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout
    for rank in range(4):
        place = f"local {rank % 2} of 2 on host-{'ab'[rank // 2]}"
        assert f"<{rank} of 4, {place}, 1111, {WORDS}, a b;c>" in done.stdout, done.stdout


def test_ranks_on_two_hosts_form_one_job(network: Network, tmp_path: Path, launcher: list[str]) -> None:
    done = started(network, tmp_path, launcher, *WORDS)
    check(done)


@pytest.mark.full
def test_a_rank_that_fails_on_the_other_host_ends_the_job(
    network: Network, tmp_path: Path, launcher: list[str]
) -> None:
    done = started(network, tmp_path, launcher, "fail")
    assert done.returncode != 0
    assert until(lambda: not any(host.processes("my script.py") for host in network.hosts.values()), 10.0)


def test_slurm_on_two_hosts(network: Network, tmp_path: Path) -> None:
    if slurm.missing():
        pytest.skip(f"needs {', '.join(slurm.missing())} (Debian package slurm-wlm)")
    with slurm.cluster(tmp_path / "slurm", list(network.hosts.values())) as environ:
        options = ["--launcher", "slurm", "--launcher_args=--ntasks-per-node=2"]
        done = started(network, tmp_path, options, *WORDS, **environ)
    check(done)
