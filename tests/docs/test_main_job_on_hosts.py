"""The main job on two hosts, started by every launcher, has the losses of one machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from comm import slurm
from docs.blocks import ROOT
from docs.test_gpt_example import EXAMPLE, SMALL
from harness.hosts import Network

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_JOB = [str(EXAMPLE / "train.py"), "--config", str(EXAMPLE / "ds_config.json"), *SMALL, "--steps", "4"]


def run(prefix: tuple[str, ...], command: list[str], runs: Path, **environ: str) -> list[float]:
    """Starts the job, and returns the loss of each step."""
    kept = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
    done = subprocess.run(
        [*prefix, *command, *_JOB, "--runs", str(runs)],
        env={**kept, "OMP_NUM_THREADS": "1", **environ},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
        cwd=ROOT,
    )
    # Status 1: after 4 steps the model is not better than the bigram model.
    assert done.returncode in (0, 1) and (runs / "001" / "result.json").exists(), done.stdout
    lines = (runs / "001" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def ssh_program(network: Network, folder: Path) -> str:
    """A program that is ssh with the key of this network."""
    program = folder / "ssh"
    program.write_text(f'#!/bin/sh\nexec /usr/bin/ssh {network.ssh_arguments} "$@"\n')
    program.chmod(0o755)
    return str(program)


@contextlib.contextmanager
def launched(name: str, network: Network, folder: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """The beginning of the command that starts one rank on each host, and its environment."""
    python, ssh = sys.executable, ssh_program(network, folder)
    if name == "ds run":
        (folder / "hostfile").write_text("host-a slots=1\nhost-b slots=1\n")
        where = ["--hostfile", str(folder / "hostfile"), "--launcher-args", network.ssh_arguments]
        yield [python, "-m", "ds_engine", "run", *where], {}
    elif name == "srun":
        if slurm.missing():
            pytest.skip(f"needs {', '.join(slurm.missing())} (Debian package slurm-wlm)")
        with slurm.cluster(folder / "slurm", list(network.hosts.values())) as environ:
            yield ["srun", "-N", "2", "-n", "2", python], dict(environ)
    elif shutil.which(name) is None:
        pytest.skip(f"needs {name} (Debian packages openmpi-bin and mpich)")
    elif name == "mpirun.openmpi":
        options = f"--allow-run-as-root --host host-a:1,host-b:1 --mca plm_rsh_agent {ssh} -x MASTER_ADDR=host-a -n 2"
        yield [name, *options.split(), python], {}
    else:
        options = (
            f"-launcher ssh -launcher-exec {ssh} -hosts host-a,host-b -ppn 1 -genv MASTER_ADDR host-a -n 2"
        )
        yield [name, *options.split(), python], {}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of two ranks on one machine."""
    command = [sys.executable, "-m", "ds_engine", "run", "--nproc", "2"]
    losses = run((), command, tmp_path_factory.mktemp("one") / "runs")
    assert len(losses) == 4
    return losses


# test_two_machines_example.py trains on two hosts in every run.
@pytest.mark.full
@pytest.mark.parametrize("launcher", ["ds run", "srun", "mpirun.openmpi", "mpiexec.hydra"])
def test_the_main_job_trains_on_two_hosts(
    launcher: str, expected: list[float], network: Network, tmp_path: Path
) -> None:
    with launched(launcher, network, tmp_path) as (command, environ):
        assert run(network["host-a"].inside_folder(ROOT), command, tmp_path / "runs", **environ) == expected
