"""`deepspeed --launcher openmpi|mpich|slurm|...`: mpirun and srun start the ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from comm import slurm
from ds_compat.launch import launcher, scheduled
from ds_engine.launch.network import free_port
from ds_engine.launch.plan import LaunchError
from engine.launching import clean_environ

SCRIPT = """
import os, sys, torch, torch.distributed as dist, ds_comm
torch.set_num_threads(1)
world = ds_comm.start(device="cpu", timeout_s=60)
x = torch.tensor(10.0 ** world.rank)
dist.all_reduce(x)
print(f"<{world.rank} of {world.world_size}: {x.item():g} {sys.argv[1:]} {os.environ.get('UCX_NOTE')}>", flush=True)
dist.destroy_process_group()
sys.exit(3 if "fail" in sys.argv else 0)
"""
WORDS = ["two words", "it's $HOME", "%h;x"]


def command(*arguments: str) -> tuple[list[str], dict[str, str]]:
    options = launcher.parse_args(list(arguments))
    return scheduled.command(options, launcher._pool, {"A": "b c"})


def programs(folder: Path, *names: str) -> str:
    """A PATH with these programs."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "needs"),
    [
        ("openmpi", "mpirun and ompi_info"),
        ("mpich", "mpirun"),
        ("impi", "mpirun"),
        ("mvapich", "mpirun and mpiname"),
    ],
)
def test_a_program_that_is_missing_is_named(
    kind: str, needs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", programs(tmp_path / "bin"))
    with pytest.raises(
        LaunchError, match=f"--launcher {kind} needs {needs} .*PATH of this machine does not have"
    ):
        command("--launcher", kind, "train.py")
    assert launcher.launch(launcher.parse_args(["--launcher", kind, "train.py"])) == 2
    assert f"cannot start: --launcher {kind} needs {needs}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "real", "says"), [("mpich", "orterun", "Open MPI"), ("openmpi", "mpirun.mpich", "MPICH")]
)
def test_mpirun_of_another_mpi_is_refused(
    kind: str, real: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(programs(tmp_path / "bin", real, "ompi_info"))
    (folder / "mpirun").symlink_to(folder / real)
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(
        LaunchError, match=rf"mpirun is .*{real}, which belongs to {says}: --launcher {kind} needs"
    ):
        command("--launcher", kind, "train.py")


def test_options_of_a_launcher_that_starts_ranks_itself() -> None:
    for option in (
        ["--no_ssh"],
        ["--venv_script", "x"],
        ["--enable_each_rank_log", "logs"],
        ["--force_multi"],
    ):
        with pytest.raises(LaunchError, match=f"cannot follow {option[0]}, because srun starts the ranks"):
            command("--launcher", "slurm", *option, "train.py")


def test_slurm_without_a_host_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", programs(tmp_path / "bin", "srun"))
    monkeypatch.setenv("SLURM_NTASKS", "6")
    words, environ = command("--launcher", "SLURM", "train.py")
    assert words[:3] == ["srun", "-n", "6"] and environ["A"] == "b c"
    words, _ = command("--launcher", "slurm", "--num_nodes", "2", "--num_gpus", "4", "train.py")
    assert words[:5] == ["srun", "-n", "8", "--nodes=2", "--gpus-per-node=4"]


def test_variables_for_every_rank() -> None:
    environ = {"PYTHONPATH": "a", "UCX_TLS": "tcp", "HOME": "/root", "MY_UCX": "1"}
    assert scheduled.exported_variables(environ, launcher.EXPORT_ENVS) == {
        "PYTHONPATH": "a",
        "UCX_TLS": "tcp",
    }


def started(folder: Path, environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the script on two ranks."""
    (folder / "my script.py").write_text(SCRIPT)
    (folder / "hosts").write_text("localhost slots=2\n")
    (folder / ".deepspeed_env").write_text("UCX_NOTE=of file; with 'quotes'\n")
    where = ["--hostfile", str(folder / "hosts"), "--master_port", str(free_port())]
    return subprocess.run(
        [sys.executable, "-m", "ds_compat.launch.launcher", *where, *arguments],
        cwd=folder,
        env={**clean_environ(), "GLOO_SOCKET_IFNAME": "lo", **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )


def check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout
    for rank in range(2):
        assert f"<{rank} of 2: 11 {WORDS} of file; with 'quotes'>" in done.stdout


@pytest.mark.parametrize(
    ("kind", "program", "package", "options"),
    [
        ("openmpi", "mpirun.openmpi", "openmpi-bin", "--allow-run-as-root --oversubscribe --bind-to none"),
        ("mpich", "mpirun.mpich", "mpich", ""),
    ],
)
def test_under_mpi(kind: str, program: str, package: str, options: str, tmp_path: Path) -> None:
    real = shutil.which(program)
    if real is None:
        pytest.skip(f"needs {program} (Debian package {package})")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mpirun").write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    (tmp_path / "bin" / "mpirun").chmod(0o755)
    path = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    arguments = ["--launcher", kind, "--launcher_args", options, "my script.py"]
    check(started(tmp_path, path, *arguments, *WORDS))
    assert started(tmp_path, path, *arguments, "fail").returncode == 3


def test_under_slurm(tmp_path: Path) -> None:
    if slurm.missing() or os.getuid() != 0:
        pytest.skip(f"needs root and {', '.join(slurm.missing())} (Debian package slurm-wlm)")
    with slurm.cluster(tmp_path / "slurm") as environ:
        check(started(tmp_path, environ, "--launcher", "slurm", "my script.py", *WORDS))


def test_a_launcher_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    options: Any = launcher.parse_args(["--launcher", "lsf", "train.py"])
    assert launcher.launch(options) == 2
    assert "--launcher lsf: `ssh` and `pdsh` are possible" in capsys.readouterr().err
