"""Jobs on several machines without machines: plans, frames, links, and verdicts about lost machines."""

from __future__ import annotations

import os
import random
import selectors
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_engine.launch.console import make_log_folder
from ds_engine.launch.failure import RankEnd, find_first
from ds_engine.launch.network import interface_towards, is_this_machine
from ds_engine.launch.output import LogFile
from ds_engine.launch.plan import LaunchError
from ds_engine.launch.remote import facts
from ds_engine.launch.remote.frames import MAGIC, Frame, FrameError, FrameReader
from ds_engine.launch.remote.job import (
    check_host_name,
    choose_master,
    first_slots,
    forwarded,
    make_shares,
    visible,
)
from ds_engine.launch.remote.link import Link, Pulse
from ds_engine.launch.remote.prepare import Script, Selection, plan_job, plan_node
from ds_engine.launch.remote.transport import Transport, split_arguments

_FRAMES = [
    Frame("output", {"rank": 3, "stream": "stderr"}, bytes(range(256)) * 40),
    Frame("start", {"environ": {"A": os.fsdecode(b"\xff\n"), "B": "漢 $(x)\0"}}),
    Frame("heartbeat"),
]


@pytest.mark.parametrize("seed", range(5))
def test_frames_arrive_whole_however_they_are_cut(seed: int) -> None:
    chooser = random.Random(seed)
    data = b"Welcome to \0ds-agent\n" + MAGIC + b"".join(frame.encoded() for frame in _FRAMES)
    reader = FrameReader(magic=True)
    arrived: list[Frame] = []
    while data:
        size = chooser.choice((1, 2, 5, 40, 4000))
        arrived += reader.feed(data[:size])
        data = data[size:]
    assert arrived == _FRAMES
    assert reader.preamble == b"Welcome to \0ds-agent\n"


@pytest.mark.parametrize("header", [b"{}", b"[]", b"x"])
def test_bytes_that_are_not_frames(header: bytes) -> None:
    with pytest.raises(FrameError, match="without a valid header"):
        list(FrameReader().feed(bytes([0, 0, 0, len(header), 0, 0, 0, 0]) + header))
    with pytest.raises(FrameError, match="a frame of 4294967295 bytes"):
        list(FrameReader().feed(b"\xff" * 8))


class _Ends:
    """Two links that are joined by pipes."""

    def __init__(self, timeout_s: float) -> None:
        self.selector = selectors.DefaultSelector()
        self.arrived: list[Frame] = []
        (a_in, b_out), (b_in, a_out) = os.pipe(), os.pipe()
        pulse = Pulse(timeout_s=timeout_s)
        self.now_s = 0.0
        self.a, self.b = (
            Link(*ends, self.selector, self.arrived.append, pulse=pulse, clock=lambda: self.now_s)
            for ends in ((a_in, a_out), (b_in, b_out))
        )

    def turn(self, seconds: float = 0.0) -> None:
        """Lets time pass, and reads what has arrived."""
        self.now_s += seconds
        for key, _ in self.selector.select(timeout=0.01):
            key.data(key.fd)


@pytest.fixture
def ends() -> Iterator[_Ends]:
    made = _Ends(timeout_s=60)
    yield made
    made.a.close("over")
    made.b.close("over")
    made.selector.close()


def test_more_than_a_pipe_holds_waits_and_arrives(ends: _Ends) -> None:
    body = os.urandom(1 << 20)
    ends.a.send("output", body, rank=0)
    assert ends.a.backlog_bytes > 0
    while not ends.arrived:
        ends.turn()
    assert ends.arrived == [Frame("output", {"rank": 0}, body)]
    assert ends.a.backlog_bytes == 0 and ends.a.closed is None


def test_heartbeats_keep_a_link_open_and_silence_closes_it(ends: _Ends) -> None:
    ends.a.status = lambda: {"stopped": [3]}
    assert ends.b.due_s == 5
    for _ in range(30):  # several times the limit
        ends.a.beat()
        ends.b.beat()
        ends.turn(5.0)
    assert ends.a.closed is None and ends.b.closed is None
    assert {frame.kind for frame in ends.arrived} == {"heartbeat"}
    assert {"stopped": [3]} in [dict(frame.fields) for frame in ends.arrived]
    heard_s = ends.now_s
    while ends.b.closed is None:  # a is stopped, or its machine has vanished
        ends.now_s = ends.b.due_s
        ends.b.beat()
    assert ends.now_s - heard_s == 60
    assert ends.b.closed == "no heartbeat for 60 s"
    while ends.a.closed is None:
        ends.turn()
    assert ends.a.closed == "the connection ended"


def test_after_a_pause_of_this_process_what_has_arrived_counts(ends: _Ends) -> None:
    ends.b.send("heartbeat")
    ends.now_s += 1000
    ends.a.beat()
    assert ends.a.closed is None


def test_shares() -> None:
    pool = {"a": [0, 1, 2], "user@b": [1, 3]}
    shares = make_shares(pool)
    assert [(s.host, s.slots, list(s.ranks), s.node_rank) for s in shares] == [
        ("a", (0, 1, 2), [0, 1, 2], 0),
        ("user@b", (1, 3), [3, 4], 1),
    ]
    assert first_slots(pool, num_nodes=1, nproc=2) == {"a": [0, 1]}
    with pytest.raises(LaunchError, match="host c has slots=0"):
        make_shares({"c": []})
    with pytest.raises(LaunchError, match="--num-nodes 3: between 1 and 2"):
        first_slots(pool, num_nodes=3, nproc=None)
    with pytest.raises(LaunchError, match="--nproc 3: host user@b has 2 slots"):
        first_slots(pool, num_nodes=None, nproc=3)


@pytest.mark.parametrize(
    "name", ["-oProxyCommand=x", "a b", "a;b", "$(x)", "a'", "", "@a", "a@-b", "a\n", "ä"]
)
def test_names_that_a_shell_or_ssh_would_misread(name: str) -> None:
    with pytest.raises(LaunchError, match="is not a name of a host"):
        check_host_name(name)


def test_names_of_hosts() -> None:
    for name in ("a", "node-1.example.org", "10.0.0.1", "fe80::1", "some.user@node_2"):
        check_host_name(name)


def test_the_address_of_rank_0() -> None:
    assert choose_master(["user@a", "b"], "") == "a"
    assert choose_master(["a", "b"], "10.0.0.1") == "10.0.0.1"
    assert choose_master(["localhost"], "") == "localhost"
    for name in ("localhost", "127.0.0.1"):
        with pytest.raises(
            LaunchError, match=f"{name} is the address of rank 0's machine, but on the other 1"
        ):
            choose_master([name, "b"], "")


def test_the_environment_that_is_forwarded() -> None:
    environ = {"PATH": "/bin", "NCCL_DEBUG": "INFO", "HOME": "/h", "TOKEN": "t", "CUDA_VISIBLE_DEVICES": "3"}
    environ["HF_TOKEN"] = "secret"
    assert forwarded(environ) == {"PATH": "/bin", "NCCL_DEBUG": "INFO"}
    assert forwarded(environ, ["TOKEN"])["TOKEN"] == "t"
    with pytest.raises(LaunchError, match="--export WHAT: this variable is not set"):
        forwarded(environ, ["WHAT"])


def test_accelerators_of_slots() -> None:
    assert visible(None, [0, 2]) == "0,2"
    assert visible("4,5,GPU-x", [0, 2]) == "4,GPU-x"


def test_the_remote_command_is_one_word_for_the_shell(tmp_path: Path) -> None:
    python = tmp_path / "it's $(a) python"
    python.write_text('#!/bin/sh\nprintf "%s|" "$0" "$@"\n')
    python.chmod(0o755)
    transport = Transport(python=str(python), port=2222, arguments=split_arguments("-v -o 'User=x y'"))
    command = transport.command("host-z.invalid")
    assert command[:3] == ["ssh", "-o", "BatchMode=yes"]
    assert command[-8:-1] == ["-p", "2222", "-v", "-o", "User=x y", "--", "host-z.invalid"]
    ran = subprocess.check_output(["sh", "-c", command[-1]], text=True)
    assert ran == f"{python}|-m|ds_engine.launch.remote.agent|"
    script = tmp_path / "act ivate"
    script.write_text("echo read\n")
    activated = Transport(python=str(python), activate=str(script)).command("host-z.invalid")[-1]
    assert subprocess.check_output(["sh", "-c", activated], text=True).startswith("read\n")
    assert shlex.split(activated)[:2] == ["cd", "/"]


def test_this_machine_needs_no_ssh() -> None:
    assert is_this_machine("localhost") and is_this_machine("127.0.0.1")
    assert not is_this_machine("host-z.invalid")
    assert Transport().command("localhost")[1:] == ["-m", "ds_engine.launch.remote.agent"]
    assert interface_towards("127.0.0.1") is None


def _end(rank: int, host: str, at: float, returncode: int = 1, **more: object) -> RankEnd:
    return RankEnd(rank=rank, pid=rank, returncode=returncode, ended_s=at, host=host, **more)  # type: ignore[arg-type]


def test_a_lost_machine_is_the_cause_although_the_others_noticed_first() -> None:
    broken = "Traceback (most recent call last):\nRuntimeError: Connection closed by peer\n"
    ends = [_end(rank, "a", 1.0, stderr=broken) for rank in range(3)]
    ends += [_end(rank, "b", 60.0, 0, lost="no heartbeat for 60 s") for rank in (3, 4)]
    finding = find_first(ends)
    assert finding is not None and finding.exit_code == 1
    assert finding.lines[0] == "machine b was lost first, with ranks 3, 4: no heartbeat for 60 s"
    assert "the other ranks: ranks 0-2 exit code 1" in finding.lines
    assert "--exclude b" in finding.lines[-1]


def test_a_rank_that_failed_before_a_machine_was_lost() -> None:
    ends = [_end(0, "a", 1.0, 3), _end(1, "b", 60.0, 0, lost="no heartbeat for 60 s")]
    finding = find_first(ends)
    assert finding is not None and finding.exit_code == 3
    assert finding.lines[0] == "rank 0 (a, pid 0) failed first: exit code 3"
    assert "the other ranks: rank 1 on b lost with its machine (no heartbeat for 60 s)" in finding.lines


def test_what_a_host_file_must_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.py").touch()
    for text, message in (
        ("a slots=0\n", "host a has slots=0"),
        ("", "empty or not formatted"),
        ("a slots=1\na slots=2\n", "multiple entries for a"),
        ("localhost slots=1\nb slots=1\n", "write its name in the network into the host file"),
        ("a slots=1\n$(b) slots=1\n", "is not a name of a host"),
    ):
        (tmp_path / "hosts").write_text(text)
        with pytest.raises(ValueError, match=message):
            plan_job(Script(name="x.py"), Selection(hostfile="hosts").pool())
    with pytest.raises(LaunchError, match="--hostfile nowhere: there is no such file"):
        Selection(hostfile="nowhere").pool()
    with pytest.raises(LaunchError, match=r"there is no file 'y\.py'"):
        plan_job(Script(name="y.py"), {"a": [0]})
    with pytest.raises(LaunchError, match="srun has already started 4"):
        plan_job(Script(name="x.py"), {"a": [0]}, environ={"SLURM_STEP_NUM_TASKS": "4"})


@pytest.mark.parametrize(
    ("nnodes", "node_rank", "endpoint", "message"),
    [
        (2, None, "a:1", "--node-rank is missing: with --nnodes 2"),
        (2, 2, "a:1", "--node-rank 2: with --nnodes 2, each machine needs its own number from 0 to 1"),
        (2, 0, None, "--rdzv-endpoint is missing"),
        (2, 0, "a:x", "--rdzv-endpoint 'a:x': write HOST:PORT"),
        (2, 0, "localhost:1", "localhost is the address of rank 0's machine"),
        (0, 0, "a:1", "--nnodes 0"),
    ],
)
def test_parts_of_a_job_that_cannot_start(
    nnodes: int, node_rank: int | None, endpoint: str | None, message: str
) -> None:
    with pytest.raises(LaunchError, match=message):
        plan_node(Script(name=__file__), nnodes=nnodes, node_rank=node_rank, endpoint=endpoint, nproc=2)


def test_a_part_of_a_job() -> None:
    plan = plan_node(
        Script(name=__file__), nnodes=3, node_rank=1, endpoint="[fe80::1]:7", nproc=2, environ={}
    )
    assert plan.first_rank == 2
    wanted = {"WORLD_SIZE": "6", "GROUP_RANK": "1", "MASTER_ADDR": "fe80::1", "MASTER_PORT": "7"}
    for local_rank, environ in enumerate(plan.environs):
        assert (
            environ.items() >= {**wanted, "RANK": str(2 + local_rank), "LOCAL_RANK": str(local_rank)}.items()
        )


def test_differences_between_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.py").write_text("pass")
    ours = facts.gather("script", "x.py", ["x.py"])
    theirs = {**ours, "torch": "2.0", "accelerators": 2, "files": {"x.py": "other"}, "program": False}
    shown = facts.differences("b", theirs, ours, script="x.py", folder="/f", slots=[0, 2])
    assert [line.split(":")[0] for line in shown] == [
        f"b has torch 2.0, this machine {ours['torch']}",
        "b has no program 'x.py' on the PATH",
        "b has another 'x.py' in /f than this machine",
        "b has 2 accelerators, but the host file or a filter names slot 2",
    ]
    assert facts.differences("b", ours, ours, script="x.py", folder="/f", slots=[0]) == []


def test_a_full_disk_ends_the_log_but_not_the_job() -> None:
    said: list[str] = []
    log = LogFile.__new__(LogFile)
    log._path, log._say, log._streams = Path("/dev/full"), said.append, 2
    log._file = os.open("/dev/full", os.O_WRONLY)
    log.feed(b"x")
    log.feed(b"y")
    log.close()
    log.close()
    assert said == ["/dev/full is incomplete from here on: No space left on device"]


def test_log_folders_are_new_and_a_file_is_none(tmp_path: Path) -> None:
    made = {make_log_folder(str(tmp_path / "logs"), "/x/train.py") for _ in range(3)}
    assert len(made) == 3 and all(path.is_dir() and path.name.startswith("train-") for path in made)
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match=r"--log-dir .*file: "):
        make_log_folder(str(tmp_path / "file"), "x.py")
