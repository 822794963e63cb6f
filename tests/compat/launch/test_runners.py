"""The runners of `deepspeed.launcher.multinode_runner`: their commands, and that every word arrives as it was given."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from deepspeed.launcher.multinode_runner import (
    IMPIRunner,
    MPICHRunner,
    MultiNodeRunner,
    MVAPICHRunner,
    OpenMPIRunner,
    PDSHRunner,
    SlurmRunner,
)
from deepspeed.launcher.runner import encode_world_info, fetch_hostfile, parse_args
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

POOL = {"worker-0": 2, "worker-1": 2}
WORLD = encode_world_info({host: list(range(slots)) for host, slots in POOL.items()})
SCHEDULERS = (OpenMPIRunner, MPICHRunner, IMPIRunner, MVAPICHRunner, SlurmRunner)
HOSTILE = [
    "",
    "two words",
    "it's",
    '"quoted"',
    "$HOME `id` $(id)",
    "a;b|c&d>e<f",
    "back\\slash",
    "%h %n %% 100%",
    "line\nbreak\ttab",
    "*?[a]~!#",
    "--flag=x,y",
    "ünï ☃",
    ":",
]
PYTHON = [sys.executable, "-u"]
words = st.text(
    st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12
)


def command(
    kind: Any, *arguments: str, exports: Mapping[str, str] | None = None, pool: Mapping[str, int] = POOL
) -> tuple[Any, dict[str, str]]:
    """The command, and the environment for it."""
    options = parse_args([*arguments])
    runner = kind(options, WORLD) if kind is PDSHRunner else kind(options, WORLD, pool)
    for name, value in (exports or {}).items():
        runner.add_export(name, value)
    environ: dict[str, str] = {}
    return runner.get_cmd(environ, pool), environ


def test_open_mpi(tmp_path: Path) -> None:
    words, _ = command(OpenMPIRunner, "train.py", "--lr", "1e-3", exports={"A": "b c"})
    meeting = ["-x", "MASTER_ADDR=worker-0", "-x", "MASTER_PORT=29500"]
    network = ["--mca", "btl", "^openib", "--mca", "btl_tcp_if_include", "eth0"]
    hosts = ["-host", "worker-0:2,worker-1:2"]
    exported = ["-x", "UCX_TLS=tcp", *meeting, "-x", "A=b c"]
    script = [*PYTHON, "train.py", "--lr", "1e-3"]
    assert words == ["mpirun", "-n", "4", *hosts, *network, *exported, *script]
    file = tmp_path / "hosts"
    file.write_text("worker-0 slots=2\nworker-1 slots=2\n")
    words, _ = command(
        OpenMPIRunner, "-H", str(file), "--launcher_args", "--mca btl_tcp_if_include 'eth 1'", "train.py"
    )
    assert words[3:10] == ["-hostfile", str(file), "--mca", "btl", "^openib", "--mca", "btl_tcp_if_include"]
    assert words[10] == "eth 1" and "eth0" not in words


def test_mpich() -> None:
    words, _ = command(
        MPICHRunner,
        "--master_port",
        "4711",
        "--master_addr",
        "10.0.0.7",
        "--module",
        "train",
        exports={"A": "b c"},
    )
    assert words[:5] == ["mpirun", "-n", "4", "-ppn", "2"]
    exported = ["-genv", "A", "b c", "-genv", "MASTER_ADDR", "10.0.0.7", "-genv", "MASTER_PORT", "4711"]
    assert words[5:14] == exported
    assert words[words.index("-hosts") + 1] == "worker-0,worker-1"
    helper = [*PYTHON, "-m", "ds_compat.launch.rank_variables"]
    assert words[-8:] == [*helper, *PYTHON, "-m", "train"]


def test_intel_mpi_has_a_part_for_each_rank() -> None:
    words, _ = command(IMPIRunner, "train.py")
    parts: list[list[str]] = [[]]
    for word in words:
        if word == ":":
            parts.append([])
        else:
            parts[-1].append(word)
    assert len(parts) == 4
    for rank, part in enumerate(parts):
        own = ["-n", "1", "-env", "RANK", str(rank), "-env", "LOCAL_RANK", str(rank % 2)]
        assert part[-11:] == [*own, *PYTHON, "train.py"]
    assert parts[0][:3] == ["mpirun", "-ppn", "2"]
    shared = dict(zip(parts[0][4::3], parts[0][5::3], strict=False))
    assert shared["WORLD_SIZE"] == "4" and shared["LOCAL_WORLD_SIZE"] == "2" and shared["I_MPI_PIN"] == "0"


def test_mvapich() -> None:
    words, _ = command(MVAPICHRunner, "--no_python", "./train", exports={"A": "b c"})
    assert words[:7] == ["mpirun", "-np", "4", "-ppn", "2", "-hosts", "worker-0,worker-1"]
    assert words[-4:] == ["-genv", "A", "b c", "./train"]


def test_slurm() -> None:
    words, environ = command(SlurmRunner, "train.py", exports={"A": "b", "C": "64(x2),32"})
    assert words == ["srun", "-n", "4", "--export=ALL,A=b", *PYTHON, "train.py"]
    assert environ == {"C": "64(x2),32"}  # srun would split it at the comma
    words, environ = command(
        SlurmRunner, "-i", "worker-0@worker-1", "--master_port", "4711", "--module", "train"
    )
    assert words[3:5] == ["--nodelist=worker-0,worker-1", "--export=ALL"] and words[-2:] == ["-m", "train"]
    assert environ == {"MASTER_PORT": "4711"}
    words, _ = command(SlurmRunner, "--num_nodes", "2", "--num_gpus", "2", "train.py")
    assert words[3:5] == ["--nodes=2", "--gpus-per-node=2"]
    with pytest.raises(ValueError, match="slurm cannot follow --include with slots"):
        command(SlurmRunner, "-i", "worker-0:1", "train.py")


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_what_a_scheduler_cannot_follow(kind: Any) -> None:
    refused = [["--bind_cores_to_rank"], ["--bind_core_list", "0-3"]]
    if kind is not SlurmRunner:
        refused += [["-i", "worker-0"], ["-e", "worker-0"], ["--num_nodes", "1"], ["--num_gpus", "1"]]
    for option in refused:
        with pytest.raises(ValueError, match=r"cannot follow --\w+: pass the options of (mpirun|srun)"):
            command(kind, *option, "train.py")


@pytest.mark.parametrize("kind", [MPICHRunner, IMPIRunner, MVAPICHRunner])
def test_machines_with_different_numbers_of_slots(kind: Any) -> None:
    with pytest.raises(ValueError, match="not a 2, b 3: change the host file"):
        command(kind, "train.py", pool={"a": 2, "b": 3})


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_words_that_reach_the_program_without_a_shell(kind: Any) -> None:
    """No shell reads them, so each is a word of the command, or a variable of its environment."""
    values = {f"V{i}": value for i, value in enumerate(HOSTILE)}
    words, environ = command(kind, "my script.py", *HOSTILE, exports=values)
    assert words[-len(HOSTILE) - 1 :] == ["my script.py", *HOSTILE]
    for name, value in values.items():
        pairs = list(pairwise(words))
        given = environ.get(name) == value or (name, value) in pairs or f"{name}={value}" in words
        export = next((word for word in words if word.startswith("--export=")), "")
        assert given or f"{name}={value}" in export.removeprefix("--export=").split(",")


RECORDER = """#!{python}
import json, os, sys
values = {{name: value for name, value in os.environ.items() if name in ("V", "VENV")}}
with open({out!r}, "w") as file:
    json.dump([sys.argv[1:], os.getcwd(), values], file)
"""


def recorder(folder: Path) -> tuple[Path, Path]:
    """A program that writes its arguments, folder and variables, and the file to which it writes them."""
    program, out = folder / "my python", folder / "out.json"
    program.write_text(RECORDER.format(python=sys.executable, out=str(out)))
    program.chmod(0o755)
    return program, out


def remote(words: list[str]) -> str:
    """What the shell of machine 1, worker-1, reads: pdsh replaces in every word, and joins them."""
    start = words.index("worker-0,worker-1") + 1
    replaced = {"%%": "%", "%h": "worker-1", "%n": "1", "%u": "root"}
    return " ".join(re.sub("%[%hnu]", lambda m: replaced[m[0]], word) for word in words[start:])


@given(st.lists(words, max_size=4), words.filter(lambda w: not w.startswith("-")), words)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_word_survives_pdsh_and_the_shell(
    tmp_path: Path, arguments: list[str], script: str, value: str
) -> None:
    program, out = recorder(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(program))
        (words, _, _), _ = command(PDSHRunner, script, *arguments, exports={"V": value})
    subprocess.run(["bash", "-c", remote(words)], check=True, timeout=60)
    argv, folder, variables = json.loads(out.read_text())
    assert argv[:3] == ["-u", "-m", "ds_compat.launch.node"] and "--node_rank=1" in argv
    assert argv[-len(arguments) - 1 :] == [script, *arguments]
    assert folder == os.getcwd() and variables == {"V": value}


def test_pdsh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, venv = tmp_path / "it's % here", tmp_path / "activate $x"
    folder.mkdir()
    venv.write_text("export VENV=active\n")
    monkeypatch.chdir(folder)
    program, out = recorder(tmp_path)
    monkeypatch.setattr(sys, "executable", str(program))
    options = ["--ssh_port", "2222", "--venv_script", str(venv), "--launcher_args", "-l 'my user'"]
    options += ["--module", "--no_local_rank", "--enable_each_rank_log", str(tmp_path / "a log")]
    (words, end, environ), same = command(PDSHRunner, *options, "train", *HOSTILE)
    assert words[:6] == ["pdsh", "-S", "-f", "1024", "-w", "worker-0,worker-1"]
    assert words[6:8] == end[6:8] == ["-l", "my user"]
    assert environ == same == {"PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": "-p 2222"}
    subprocess.run(["bash", "-c", remote([*words[:6], *words[8:]])], check=True, timeout=60)
    argv, where, variables = json.loads(out.read_text())
    assert where == str(folder) and variables["VENV"] == "active"
    assert argv[3:] == [
        f"--world_info={WORLD}",
        "--node_rank=1",
        "--master_addr=worker-0",
        "--master_port=29500",
        "--module",
        "--no_local_rank",
        f"--enable_each_rank_log={tmp_path}/a log",
        "train",
        *HOSTILE,
    ]


def test_the_end_of_a_job_under_pdsh_finds_its_launchers_and_not_itself() -> None:
    (_, end, _), _ = command(PDSHRunner, "train.py")
    launcher = f"python -u -m ds_compat.launch.node --world_info={WORLD} --node_rank=1 --master_port=29500 x"
    pattern = remote(end).partition("pkill -TERM -f ")[2].strip("'")
    assert re.search(pattern, launcher) and not re.search(pattern, remote(end))
    assert not re.search(pattern, launcher.replace("29500", "29501"))


def test_real_pdsh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("pdsh") is None:
        pytest.skip("needs pdsh (Debian package pdsh)")
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    # The host is the first word after the options; a shell reads the rest, as sshd has it.
    ssh.write_text(
        '#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\n[ "$1" = worker-1 ] && bash -c "${*:2}"\nexit 0\n'
    )
    ssh.chmod(0o755)
    program, out = recorder(tmp_path)
    monkeypatch.setattr(sys, "executable", str(program))
    (words, _, environ), _ = command(PDSHRunner, "train.py", *HOSTILE, exports={"V": HOSTILE[7]})
    path = f"{ssh.parent}:{os.environ['PATH']}"
    subprocess.run(words, env={**os.environ, **environ, "PATH": path}, check=True, timeout=60)
    argv, _, variables = json.loads(out.read_text())
    assert "--node_rank=1" in argv and argv[-len(HOSTILE) - 1 :] == ["train.py", *HOSTILE]
    assert variables["V"] == HOSTILE[7]


@given(words)
@settings(max_examples=15, deadline=None)
def test_exports_are_words_of_a_shell(value: str) -> None:
    class Own(MultiNodeRunner):
        def backend_exists(self) -> bool:
            return True

        def get_cmd(self, environment: Any, active_resources: Any) -> list[str]:
            return []

    runner = Own(parse_args(["train.py", "a b"]), WORLD)
    assert runner.user_arguments == ["a b"] and runner.name == "Own"
    runner.add_export("V", value)
    printed = subprocess.run(
        ["bash", "-c", f'V={runner.exports["V"]}; printf %s "$V"'],
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert printed.stdout.decode() == value
    with pytest.raises(ValueError, match="no name of an environment variable"):
        runner.add_export("A B", value)


def test_which_program_a_runner_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = {
        PDSHRunner: ["pdsh"],
        OpenMPIRunner: ["mpirun", "ompi_info"],
        MPICHRunner: ["mpirun"],
        IMPIRunner: ["mpirun"],
        MVAPICHRunner: ["mpirun", "mpiname"],
        SlurmRunner: ["srun"],
    }
    options = parse_args(["train.py"])
    for kind, programs in needed.items():
        folder = tmp_path / kind.__name__
        folder.mkdir()
        monkeypatch.setenv("PATH", str(folder))
        runner = kind(options, WORLD) if kind is PDSHRunner else kind(options, WORLD, POOL)
        for program in programs:
            assert not runner.backend_exists()
            (folder / program).write_text("#!/bin/sh\n")
            (folder / program).chmod(0o755)
        assert runner.backend_exists()
    assert [kind(options, WORLD, POOL).name for kind in SCHEDULERS] == [
        "openmpi",
        "mpich",
        "impi",
        "mvapich",
        "slurm",
    ]


def test_host_files_have_numbers_of_slots(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("worker-0 slots=2\n\n# more\nworker-1 slots=1\n")
    assert fetch_hostfile(str(file)) == {"worker-0": 2, "worker-1": 1}
    assert fetch_hostfile(str(tmp_path / "none")) is None
