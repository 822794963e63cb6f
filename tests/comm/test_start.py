"""`start` on real processes: every launcher, groups that are there already, ranks that do not meet."""

from __future__ import annotations

import datetime
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import ds_comm
from comm import slurm
from ds_comm import world
from harness import ranks

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _placed_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _TORCHRUN:
        monkeypatch.delenv(name)


def _sum_of_ranks() -> float:
    x = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(x)
    return x.item()


@ranks(2)
def test_from_torchruns_variables(world_size: int) -> None:
    rank = dist.get_rank()
    dist.destroy_process_group()
    world = ds_comm.start(device="cpu", timeout_s=30)
    assert world == ds_comm.World(
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_size=world_size,
        device=torch.device("cpu"),
        backend="gloo",
        source="torchrun",
    )
    assert _sum_of_ranks() == 1.0
    assert ds_comm.start(device="cpu") == world  # once more changes nothing


@ranks(2)
def test_from_slurms_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    rank, port = dist.get_rank(), os.environ["MASTER_PORT"]
    dist.destroy_process_group()
    _placed_by_nobody(monkeypatch)
    variables = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_TASKS_PER_NODE": "2",
        "MASTER_PORT": port,  # otherwise made from the job's number, which two test runs share
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    world = ds_comm.start(device="cpu", timeout_s=30)
    assert (world.rank, world.local_rank, world.local_size, world.source) == (rank, rank, 2, "slurm")
    assert _sum_of_ranks() == 1.0


@ranks(1)
def test_a_single_process_needs_no_variables_and_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    dist.destroy_process_group()
    _placed_by_nobody(monkeypatch)
    before = _listening()
    world = ds_comm.start(device="cpu")
    assert (world.rank, world.world_size, world.source, world.backend) == (0, 1, "single", "gloo")
    assert _sum_of_ranks() == 0.0
    assert _listening() == before


def _listening() -> set[str]:
    """Sockets of this process that wait for connections on other interfaces than gloo's loopback pairs do."""
    own = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            own.add(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    rows += [line.split() for line in Path("/proc/self/net/tcp6").read_text().splitlines()[1:]]
    loopback = "0100007F"
    return {f"socket:[{r[9]}]" for r in rows if r[3] == "0A" and r[1].split(":")[0] != loopback} & own


@ranks(2)
def test_a_group_of_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = dist.get_rank()
    _placed_by_nobody(monkeypatch)
    world = ds_comm.start()
    assert (world.rank, world.world_size, world.local_rank, world.local_size) == (rank, 2, rank, 2)
    assert (world.source, world.backend, world.device) == ("user", "gloo", torch.device("cpu"))
    with pytest.raises(ValueError, match=r"backend 'mpi' was requested, but .* already runs with 'gloo'"):
        ds_comm.start(backend="mpi")


@ranks(2)
def test_a_taken_port(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = dist.get_rank()
    dist.destroy_process_group()
    if rank == 0:
        with socket.socket() as taken:
            taken.bind(("", 0))
            taken.listen()
            monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
            with pytest.raises(
                ds_comm.StartError, match=r"rank 0 of 2 .*cannot listen on port .*MASTER_PORT"
            ):
                ds_comm.start(device="cpu", timeout_s=5)
    assert not dist.is_initialized()


@ranks(2)
def test_nobody_is_there() -> None:
    rank = dist.get_rank()
    dist.destroy_process_group()
    if rank == 1:
        with pytest.raises(ds_comm.StartError, match=r"rank 1 of 2 \(placed by torchrun\) did not connect"):
            ds_comm.start(device="cpu", timeout_s=1)
    assert not dist.is_initialized()


@ranks(1)
def test_what_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    dist.destroy_process_group()
    with pytest.raises(ValueError, match=r"backend 'glou' is not in torch .* available: .*gloo"):
        ds_comm.start(device="cpu", backend="glou")
    other = "xpu" if torch.accelerator.is_available() else "cuda"
    with pytest.raises(ValueError, match=rf"device '{other}' was requested, but torch .* finds"):
        ds_comm.start(device=other)
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "node-a")  # on this machine alone the rank is the local rank
    with pytest.raises(ds_comm.PlacementError, match="LOCAL_RANK is missing"):
        ds_comm.start()
    assert not dist.is_initialized()


@pytest.mark.gpu
@ranks(1)
def test_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    dist.destroy_process_group()
    _placed_by_nobody(monkeypatch)
    world = ds_comm.start()
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    assert world.device == torch.device(kind.type, 0)
    assert world.backend == dist.get_default_backend_for_device(kind)
    x = torch.ones(3, device=world.device)
    dist.all_reduce(x)
    assert x.tolist() == [1.0, 1.0, 1.0]
    assert ds_comm.data_mesh(world).device_type == kind.type


_SCRIPT = """
import sys, torch, torch.distributed as dist, ds_comm
torch.set_num_threads(1)
world = ds_comm.start(device="cpu", timeout_s=60)
x = torch.tensor(10.0 ** world.rank)
dist.all_reduce(x)
print(f"<{world.rank} of {world.world_size}, local {world.local_rank} of {world.local_size}, "
      f"{world.source}: {x.item():g}>", flush=True)
dist.destroy_process_group()
"""


def _clean_environ() -> dict[str, str]:
    environ = {name: value for name, value in os.environ.items() if name not in _TORCHRUN}
    return {**environ, "GLOO_SOCKET_IFNAME": "lo"}


@pytest.mark.parametrize(
    ("command", "package", "options"),
    [
        ("mpirun.openmpi", "openmpi-bin", ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]),
        ("mpiexec.hydra", "mpich", []),
    ],
)
def test_under_mpi(command: str, package: str, options: list[str], tmp_path: Path) -> None:
    if shutil.which(command) is None:
        pytest.skip(f"needs {command} (Debian package {package})")
    (tmp_path / "script.py").write_text(_SCRIPT)
    environ = _clean_environ()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        environ["MASTER_PORT"] = str(probe.getsockname()[1])
    done = subprocess.run(
        [command, *options, "-n", "2", sys.executable, str(tmp_path / "script.py")],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    for rank in range(2):
        assert f"<{rank} of 2, local {rank} of 2, mpi: 11>" in done.stdout


def test_under_slurm(tmp_path: Path) -> None:
    if slurm.missing() or os.getuid() != 0:
        pytest.skip(f"needs root and {', '.join(slurm.missing())} (Debian package slurm-wlm)")
    (tmp_path / "script.py").write_text(_SCRIPT)
    batch = tmp_path / "batch.sh"
    batch.write_text(f"#!/bin/sh\nexec {sys.executable} {tmp_path}/script.py\n")
    with slurm.cluster(tmp_path / "slurm") as found:
        options = {"env": {**_clean_environ(), **found}, "cwd": tmp_path, "timeout": 120, "text": True}
        run = ["srun", "-n", "2", sys.executable, "script.py"]
        done = subprocess.run(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, **options)  # type: ignore[call-overload]
        assert done.returncode == 0, done.stdout
        # The batch script itself is no step of srun's, and would wait for a second rank that nobody starts.
        command = ["sbatch", "--wait", "-n", "2", "-o", str(tmp_path / "batch.out"), str(batch)]
        refused = subprocess.run(command, capture_output=True, check=False, **options)  # type: ignore[call-overload]
    for rank in range(2):
        assert f"<{rank} of 2, local {rank} of 2, slurm: 11>" in done.stdout
    assert refused.returncode == 1
    assert "SLURM_NTASKS=2, but this process was not started by srun" in (tmp_path / "batch.out").read_text()


def test_ending_right_after_a_collective_is_no_crash(tmp_path: Path) -> None:
    """Without the pause at exit about a quarter of such processes end with SIGABRT inside torch's gloo threads."""
    script = tmp_path / "end.py"
    script.write_text(
        "import torch, torch.distributed as dist, ds_comm\n"
        "ds_comm.start(device='cpu')\n"
        "kept = dist.group.WORLD\n"
        "dist.broadcast(torch.zeros(1000), 0)\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    for _ in range(8 if os.environ.get("DS_TEST_FULL") == "1" else 2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr


def _waiting(port: int) -> ds_comm.Placement:
    return ds_comm.Placement(
        rank=1,
        world_size=2,
        local_rank=1,
        local_size=2,
        master_addr="127.0.0.1",
        master_port=port,
        source="ds run",
    )


def test_a_rank_that_waits_says_early_what_it_has_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before, nothing was heard until the timeout, which is half an hour."""
    said, lines = threading.Event(), []

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            said.set()

    handler = Heard()
    logging.getLogger("ds_comm").addHandler(handler)
    monkeypatch.setattr(world, "REPORT_S", 0.01)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: said.wait(60))
    try:
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            port = listening.getsockname()[1]
            patience = datetime.timedelta(seconds=1800)
            world._initialise(_waiting(port), torch.device("cpu"), "gloo", patience)
            assert said.is_set()
            assert "rank 1 of 2 (placed by ds run) has waited" in lines[0] and "up to 1800 s" in lines[0]
            assert f"a connection to 127.0.0.1:{port} fails" in lines[0]
            listening.listen()
            world._report_waiting(_waiting(port), patience)
            assert f"127.0.0.1:{port} answers, so another rank is missing" in lines[1]
    finally:
        logging.getLogger("ds_comm").removeHandler(handler)
