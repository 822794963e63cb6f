"""The command `deepspeed`: on this machine, on the machines of a host file, and with one command on each machine."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from ds_compat.launch import launcher
from engine.launching import Job
from harness.hosts import Network

_LAUNCHER = ("ds_compat.launch.launcher",)
_REPORT = """
import json, socket
names = ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES", "FROM_FILE"]
report = {"argv": sys.argv[1:], "host": socket.gethostname(), **{name: os.environ.get(name) for name in names}}
(HERE / f"report{RANK}").write_text(json.dumps(report))
print("said by", RANK)
"""


def _reports(folder: Path, count: int) -> list[dict[str, object]]:
    return [json.loads((folder / f"report{rank}").read_text()) for rank in range(count)]


def test_the_machines_of_a_host_file(network: Network, tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("host-a slots=2\nhost-b slots=4\n")
    (tmp_path / ".deepspeed_env").write_text("FROM_FILE=a b'c\n")
    job = Job(
        tmp_path,
        _REPORT,
        *("--hostfile", str(tmp_path / "hostfile"), "--include", "host-a:1@host-b:0,3"),
        *("--launcher_args", network.ssh_arguments, "--enable_each_rank_log", str(tmp_path / "logs")),
        arguments=("--x", "$(y)"),
        prefix=network["host-a"].inside_folder(tmp_path),
        module=_LAUNCHER,
    )
    code, out, err = job.finish()
    assert code == 0, err
    places = [("host-a", 0, "1"), ("host-b", 0, "0,3"), ("host-b", 1, "0,3")]
    for report, (host, local_rank, visible) in zip(_reports(tmp_path, 3), places, strict=True):
        assert report == {
            "argv": [f"--local_rank={local_rank}", "--x", "$(y)"],
            "host": host,
            "WORLD_SIZE": "3",
            "LOCAL_RANK": str(local_rank),
            "MASTER_ADDR": "host-a",
            "CUDA_VISIBLE_DEVICES": visible,
            "FROM_FILE": "a b'c",
        }
    assert out == "said by 0\n"
    (logs,) = (tmp_path / "logs").iterdir()
    assert [(logs / f"rank_{rank}.log").read_text() for rank in range(3)] == [
        f"said by {rank}\n" for rank in range(3)
    ]


@pytest.mark.parametrize("hostfile", ["localhost slots=2\n", "host-a slots=1\nhost-b slots=2\n"])
def test_each_rank_has_its_own_cores(hostfile: str, network: Network, tmp_path: Path) -> None:
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        pytest.skip("needs two cores")
    (tmp_path / "hostfile").write_text(hostfile)
    source = '(HERE / f"cores{RANK}").write_text(str(sorted(os.sched_getaffinity(0))))'
    job = Job(
        tmp_path,
        source,
        *("--hostfile", str(tmp_path / "hostfile"), "--launcher_args", network.ssh_arguments),
        *("--bind_cores_to_rank", "--bind_core_list", f"{usable[1]},{usable[0]}"),
        prefix=network["host-a"].inside_folder(tmp_path),
        module=_LAUNCHER,
    )
    code, _, err = job.finish()
    assert code == 0, err
    bound = [(tmp_path / f"cores{rank}").read_text() for rank in range(2 if "localhost" in hostfile else 3)]
    assert bound[-2:] == [str([usable[1]]), str([usable[0]])]
    assert len(bound) == 2 or bound[0] == str(usable[:2])


def test_one_command_on_each_machine(network: Network, tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("host-a slots=1\nhost-b slots=2\n")
    jobs = [
        Job(
            tmp_path,
            _REPORT,
            *("--hostfile", str(tmp_path / "hostfile"), "--no_ssh", "--node_rank", str(node)),
            *("--master_port", "23456", "--no_local_rank"),
            prefix=network[name].inside_folder(tmp_path),
            module=_LAUNCHER,
        )
        for node, name in enumerate(("host-a", "host-b"))
    ]
    assert [job.finish()[0] for job in jobs] == [0, 0]
    reports = _reports(tmp_path, 3)
    assert [report["host"] for report in reports] == ["host-a", "host-b", "host-b"]
    assert {report["WORLD_SIZE"] for report in reports} == {"3"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--hostfile {} --num_nodes 3 x.py", "--num_nodes 3: .* names 2 machines"),
        ("--hostfile {} --num_gpus 4 x.py", "--num_gpus 4: .* fewer slots"),
        ("--num_nodes 2 x.py", "name the machines in a host file"),
    ],
)
def test_what_a_host_file_does_not_have(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("a slots=2\nb slots=8\n")
    with pytest.raises(ValueError, match=message):
        launcher.main(line.format(tmp_path / "hostfile").split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--launcher lsf", "--launcher lsf: .* mpirun or srun"),
        (
            "--elastic_training --min_elastic_nodes 3 --force_multi",
            "--min-nodes 3 is more than the 1 machines",
        ),
        ("--no_ssh --node_rank 1", "the number of this machine is 1"),
        ("--num_gpus 1 --hostfile {}", "'-oProxyCommand=x' is not a name of a host"),
    ],
)
def test_what_cannot_start(
    options: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("-oProxyCommand=x slots=1\n")
    (tmp_path / "x.py").touch()
    words = [*options.format(hostfile).split(), str(tmp_path / "x.py")]
    assert launcher.launch(launcher.parse_args(words)) == 2
    said = capfd.readouterr().err
    assert re.search(message, said), said


def test_an_elastic_job_starts_again_without_a_lost_machine(network: Network, tmp_path: Path) -> None:
    """One machine of two fails in the first start, where the third one of the file is a spare."""
    (tmp_path / "hostfile").write_text("host-b slots=1\nhost-a slots=1\n10.77.0.99 slots=1\n")
    source = """
attempt = os.environ["DS_RESTART_COUNT"]
mark(f"attempt{attempt}-")
if attempt == "0":
    time.sleep(100)
(HERE / "ranks").write_text(os.environ["WORLD_SIZE"] + " " + os.environ["MASTER_ADDR"])
"""
    job = Job(
        tmp_path,
        source,
        *(
            "--hostfile",
            str(tmp_path / "hostfile"),
            "--launcher_args",
            network.ssh_arguments,
            "--elastic_training",
        ),
        *("--min_elastic_nodes", "1", "--max_elastic_nodes", "2"),
        prefix=network["host-a"].inside_folder(tmp_path),
        module=_LAUNCHER,
    )
    job.pids("attempt0-")
    for pid in network["host-b"].processes("ds_engine.launch.remote.agent"):
        os.kill(pid, signal.SIGKILL)
    code, _, err = job.finish()
    assert code == 0, err
    assert "restart 1 of 100" in err and "without host-b: 2 machines" in err
    assert "10.77.0.99 cannot be used" in err
    assert (tmp_path / "ranks").read_text() == "1 host-a"
