"""`deepspeed.launcher.launch`: the ranks of one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.launcher import launch as node_launcher
from deepspeed.launcher.runner import encode_world_info

from ds_compat.launch import node, rank_variables
from ds_engine.launch.plan import LaunchError
from engine.launching import clean_environ

WORLD = encode_world_info({"a": [0, 1], "b": [1, 3, 5]})


def planned(*arguments: str) -> list[dict[str, str]]:
    options = node.parse_args([f"--world_info={WORLD}", "--master_addr=127.0.0.1", *arguments, __file__])
    return [dict(environ) for environ in node.plan(options, {"A": "b"}).environs]


def test_ranks_count_over_the_machines_before() -> None:
    environs = planned("--node_rank=1")
    assert [(e["RANK"], e["LOCAL_RANK"], e["WORLD_SIZE"]) for e in environs] == [
        ("2", "0", "5"),
        ("3", "1", "5"),
        ("4", "2", "5"),
    ]
    assert environs[0]["CUDA_VISIBLE_DEVICES"] == "1,3,5" and environs[0]["A"] == "b"
    assert environs[0]["LOCAL_SIZE"] == environs[0]["LOCAL_WORLD_SIZE"] == "3"
    assert [e["RANK"] for e in planned("--node_rank=0")] == ["0", "1"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--node_rank=2"], "--node_rank 2: --world_info names 2 machine"),
        (["--world_info=none"], "is not what encode_world_info returns"),
        (["--world_info=WzFd"], "is not what encode_world_info returns"),
        (["--module", "--no_python"], "exclude each other"),
    ],
)
def test_mistakes(arguments: list[str], says: str) -> None:
    with pytest.raises(LaunchError, match=says):
        planned(*arguments)


def test_two_machines_of_one_job(tmp_path: Path) -> None:
    """Both launchers run here, one for each machine of the job."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, torch, torch.distributed as dist, ds_comm\n"
        "world = ds_comm.start(device='cpu', timeout_s=60)\n"
        "x = torch.tensor(10.0 ** world.rank)\n"
        "dist.all_reduce(x)\n"
        "print(f'<{world.rank} of {world.world_size}: {x.item():g} {sys.argv[1:]}>', flush=True)\n"
    )
    with_port = f"--master_port={_free_port()}"
    world = f"--world_info={encode_world_info({'a': [0], 'b': [0]})}"
    command = [sys.executable, "-m", "ds_compat.launch.node", world, with_port]
    environ = {**clean_environ(), "GLOO_SOCKET_IFNAME": "lo"}
    jobs = [
        subprocess.Popen(
            [*command, f"--node_rank={rank}", str(script), "a b"],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for rank, job in enumerate(jobs):
        out, _ = job.communicate(timeout=120)
        assert job.returncode == 0, out
        assert f"<{rank} of 2: 11 ['--local_rank=0', 'a b']>" in out
    assert node_launcher.main is node.main


def _free_port() -> int:
    from ds_engine.launch.network import free_port

    return free_port()


def test_a_script_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        node.main([f"--world_info={WORLD}", "missing.py"])
    assert ended.value.code == 2 and "cannot start: there is no file 'missing.py'" in capsys.readouterr().err


def test_variables_of_torchrun_from_those_of_mpi() -> None:
    hydra = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    own = rank_variables.variables({**hydra, "MASTER_ADDR": "a", "MASTER_PORT": "4711"})
    assert own == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "LOCAL_SIZE": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "4711",
    }
    show = [sys.executable, "-c", "import os; print(os.environ['RANK'], os.environ['LOCAL_RANK'])"]
    command = [sys.executable, "-m", "ds_compat.launch.rank_variables", *show]
    done = subprocess.run(
        command, env={**_bare(), **hydra}, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.stdout, done.returncode) == ("1 1\n", 0), done.stderr
    contradiction = {**_bare(), **hydra, "RANK": "0", "WORLD_SIZE": "2"}
    done = subprocess.run(command, env=contradiction, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1 and "RANK=0 and PMI_RANK=1 contradict" in done.stderr


def _bare() -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in names}
