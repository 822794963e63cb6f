"""The launcher's pure parts: plans, verdicts about ranks, and what is kept of output."""

from __future__ import annotations

import dataclasses
import os
import signal
import tempfile
from pathlib import Path

import pytest

from ds_engine.launch import devices, machine
from ds_engine.launch.failure import (
    SUMMARY_LINES,
    RankEnd,
    exception_line,
    find_first,
    last_traceback,
    shortened,
)
from ds_engine.launch.output import PassThrough, Prefixed, Tail
from ds_engine.launch.plan import (
    LaunchError,
    Part,
    bind_cores,
    choose_nproc,
    make_plan,
    parse_cores,
    refuse_nesting,
)

_VALUE_ERROR = """Traceback (most recent call last):
  File "train.py", line 3, in <module>
    f()
ValueError: bad value
"""
_LOST_PEER = """Traceback (most recent call last):
  File "train.py", line 9, in <module>
    dist.barrier()
RuntimeError: [pair.cc:553] Connection closed by peer [127.0.0.1]:1
"""


def _end(rank: int, returncode: int, at: float, stderr: str = "", **more: object) -> RankEnd:
    traceback_s = at if stderr.startswith("Traceback") else None
    values: dict[str, object] = {"traceback_s": traceback_s, **more}
    return RankEnd(rank=rank, pid=100 + rank, returncode=returncode, ended_s=at, stderr=stderr, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ends", "rank", "code"),
    [
        ([_end(0, 0, 1.0), _end(1, 3, 2.0)], 1, 3),
        ([_end(0, 4, 2.0), _end(1, 3, 1.0)], 1, 3),
        ([_end(0, 1, 1.0, _LOST_PEER), _end(1, 1, 1.2, _VALUE_ERROR)], 1, 1),
        ([_end(0, 1, 1.0, _LOST_PEER), _end(1, -9, 1.2)], 1, 137),
        ([_end(0, 1, 1.0, _LOST_PEER), _end(1, 1, 1.2, _LOST_PEER)], 0, 1),
        (
            [_end(0, 1, 1.0, _LOST_PEER), _end(1, -15, 3.0, _VALUE_ERROR, ended_by_us=True, traceback_s=0.9)],
            1,
            1,
        ),
        (
            [
                _end(0, 1, 99.0, _VALUE_ERROR),
                _end(1, -15, 99.5, _VALUE_ERROR, ended_by_us=True, traceback_s=1.0),
            ],
            0,
            1,
        ),
        ([_end(0, -6, 1.0, "terminate called: heartbeat of peer lost"), _end(1, 7, 1.5)], 1, 7),
        ([_end(0, -15, 1.0, ended_by_us=True), _end(1, -11, 0.5)], 1, 139),
    ],
    ids=["only", "earlier", "cause", "killed", "both", "slow", "logged", "abort", "ended"],
)
def test_which_rank_failed_first(ends: list[RankEnd], rank: int, code: int) -> None:
    finding = find_first(ends)
    assert finding is not None
    assert (finding.end.rank, finding.exit_code) == (rank, code)


def test_no_rank_failed() -> None:
    assert find_first([_end(0, 0, 1.0), _end(1, 0, 2.0)]) is None


@pytest.mark.parametrize(
    ("end", "oom_killed", "remedy"),
    [
        (_end(0, -9, 1.0), False, "SIGKILL usually means out of memory"),
        (_end(0, -9, 1.0), True, "the kernel's OOM killer killed it"),
        (_end(0, 1, 1.0, _VALUE_ERROR), True, "the kernel's OOM killer killed it"),  # a worker of it
        (_end(0, -int(signal.SIGBUS), 1.0), False, "/dev/shm is full"),
        (_end(0, -int(signal.SIGILL), 1.0), False, "native code crashed"),
        (_end(0, -15, 1.0), False, "another process sent this signal"),
        (_end(0, 1, 1.0, _VALUE_ERROR), False, "fix the error above"),
        (_end(0, 1, 1.0), False, "without a traceback"),
    ],
)
def test_every_failure_has_a_remedy(end: RankEnd, oom_killed: bool, remedy: str) -> None:
    finding = find_first([dataclasses.replace(end, oom_killed=oom_killed)])
    assert finding is not None
    assert finding.lines[-1].startswith("what to do: ")
    assert remedy in finding.lines[-1]


def test_the_oom_killer_is_named_with_figures() -> None:
    finding = find_first(
        [dataclasses.replace(_end(0, -9, 1.0), oom_killed=True, memory="the limit is 1 GiB")]
    )
    assert finding is not None
    assert "the kernel's OOM killer killed it: the limit is 1 GiB (`ds doctor`" in finding.lines[-1]


def test_tracebacks_are_found_in_noise() -> None:
    during = "\nDuring handling of the above exception, another exception occurred:\n\n"
    text = f"warning: x\n{_LOST_PEER}{during}{_VALUE_ERROR}"
    assert last_traceback(text) == text[len("warning: x\n") :].rstrip()
    assert exception_line(last_traceback(text)) == "ValueError: bad value"
    assert last_traceback(f"{_LOST_PEER}logged, and on\n{_VALUE_ERROR}") == _VALUE_ERROR.rstrip()
    assert last_traceback("no trace") == ""


def test_a_deep_recursion_is_shortened_in_the_middle() -> None:
    frames = "".join(f'  File "x.py", line {i}, in f\n' for i in range(500))
    finding = find_first(
        [_end(0, 1, 1.0, f"Traceback (most recent call last):\n{frames}RecursionError: deep")]
    )
    assert finding is not None
    assert len(finding.lines) <= SUMMARY_LINES
    assert any("lines ..." in line for line in finding.lines)
    assert any("RecursionError: deep" in line for line in finding.lines)
    assert any("line 499, in f" in line for line in finding.lines), "the innermost frame"


def test_a_summary_fits_on_a_screen_and_keeps_the_ranks_own_explanation() -> None:
    frames = "".join(f'  File "x.py", line {i}, in f\n    f()\n' for i in range(12))
    cause = f"Traceback (most recent call last):\n{frames}RuntimeError: Connection closed by peer\n"
    chained = "\nThe above exception was the direct cause of the following exception:\n\n"
    ranks = "\n".join(f"  rank {r}: step 3, waits at train.py:9" for r in range(40))
    said = f"ds_zero.RankOrderError: rank 1 do not answer\n{ranks}\nwhat to do"
    stderr = f"{cause}{chained}Traceback (most recent call last):\n{frames}{said}\n"
    finding = find_first([_end(r, 1, 1.0 + r, stderr) for r in range(4)])
    assert finding is not None and len(finding.lines) <= SUMMARY_LINES
    text = "\n".join(finding.lines)
    assert "RankOrderError: rank 1 do not answer" in text and "rank 0: step 3" in text
    assert text.count("RankOrderError") == 1 and "Connection closed" not in text
    assert "lines more ..." in text and "line 11, in f" in text


def test_a_short_traceback_stays_whole() -> None:
    assert shortened(_VALUE_ERROR.rstrip()) == _VALUE_ERROR.rstrip().split("\n")


@pytest.mark.parametrize(
    ("wish", "accelerators", "cores", "count"),
    [(3, 8, 2, 3), (None, 8, 2, 8), (None, 0, 16, 2), (None, 0, 1, 1)],
)
def test_number_of_ranks(wish: int | None, accelerators: int, cores: int, count: int) -> None:
    assert choose_nproc(wish, accelerators, cores)[0] == count


def _plan(environ: dict[str, str], nproc: int = 2, cores: int = 8) -> list[dict[str, str]]:
    plan = make_plan(
        python="python",
        target=["x.py", "-a"],
        part=Part(nproc=nproc, world_size=nproc, master_port=1234, interface="lo"),
        environ=environ,
        cores=cores,
    )
    assert plan.command == ("python", "x.py", "-a")
    return [dict(environ) for environ in plan.environs]


def test_environments() -> None:
    first, second = _plan({"HOME": "/h", "RANK": "5", "WORLD_SIZE": "9"})
    assert first == {**second, "RANK": "0", "LOCAL_RANK": "0"}
    assert (second["RANK"], second["WORLD_SIZE"], second["MASTER_PORT"], second["HOME"]) == (
        "1",
        "2",
        "1234",
        "/h",
    )
    assert (second["OMP_NUM_THREADS"], second["GLOO_SOCKET_IFNAME"], second["PYTHONUNBUFFERED"]) == (
        "4",
        "lo",
        "1",
    )
    assert _plan({}, nproc=16)[0]["OMP_NUM_THREADS"] == "1"
    assert _plan({"OMP_NUM_THREADS": "3", "GLOO_SOCKET_IFNAME": "eth0"})[0]["OMP_NUM_THREADS"] == "3"
    assert _plan({"OMP_NUM_THREADS": "3", "GLOO_SOCKET_IFNAME": "eth0"})[0]["GLOO_SOCKET_IFNAME"] == "eth0"
    refuse_nesting({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"})  # the shell of an allocation
    with pytest.raises(LaunchError, match="mpiexec has already started 4 processes"):
        refuse_nesting({"PMI_SIZE": "4"})


def test_ranks_are_bound_to_equal_parts_of_the_cores() -> None:
    part = Part(nproc=2, world_size=2, master_port=1, interface=None)
    plan = make_plan(python="python", target=["x.py"], part=part, environ={}, cores=8)
    bound = bind_cores(plan, [0, 1, 4, 5, 9], keep_threads=False)
    assert bound.cores == ((0, 1), (4, 5)) and plan.cores_of(0) == ()
    assert [environ["OMP_NUM_THREADS"] for environ in bound.environs] == ["2", "2"]
    assert bind_cores(plan, [0, 1], keep_threads=True).environs[0]["OMP_NUM_THREADS"] == "4"
    with pytest.raises(LaunchError, match=r"2 ranks cannot be bound to 1 cores \(3\)"):
        bind_cores(plan, [3], keep_threads=False)


def test_lists_of_cores() -> None:
    assert parse_cores("", [0, 2]) == [0, 2]
    assert parse_cores("0-2,8,1", range(9)) == [0, 1, 2, 8]
    for text, message in (
        ("a", "is not a list of cores"),
        ("-3", "is not a list"),
        ("7-9", r"\[9\] cannot be used"),
    ):
        with pytest.raises(LaunchError, match=message):
            parse_cores(text, range(9))


def _written(pieces: list[bytes], prefix: str | None) -> bytes:
    with tempfile.TemporaryFile() as file:
        stream = PassThrough(file.fileno()) if prefix is None else Prefixed(file.fileno(), prefix)
        for piece in pieces:
            stream.feed(piece)
        stream.close()
        return os.pread(file.fileno(), 1 << 20, 0)


def test_prefixes() -> None:
    assert _written([b"a", b"b\nc", b"\n\nd"], "> ") == b"> ab\n> c\n> \n> d\n"
    assert _written([b"1%\r2%", b"\r3%\ndone\r\n"], "> ") == b"> 3%\n> done\n"
    assert _written([b"[rank1]: Traceback\n"], "> ") == b"> Traceback\n"
    assert _written([b"x" * 70_000, b"y\n"], "> ") == b"> " + b"x" * 70_000 + b"\n> y\n"
    assert _written([b"1%\r", b"2%\r"], None) == b"1%\r2%\r"


def test_a_tail_knows_when_the_last_traceback_began() -> None:
    now = [1.0]
    tail = Tail(clock=lambda: now[0])

    def seen() -> float | None:
        return tail.traceback_s

    tail.feed(b"noise\nTraceback (most rec")
    assert seen() is None
    now[0] = 2.0
    tail.feed(b"ent call last):\n")
    assert seen() == 2.0
    now[0] = 3.0
    tail.feed(b"  File\nValueError\n")
    assert seen() == 2.0
    tail.feed(b"[rank3]: Traceback (most recent call last):\n")
    assert seen() == 3.0
    assert tail.text().endswith("ValueError\nTraceback (most recent call last):\n")
    tail.feed(b"z" * 1_000_000)
    assert len(tail.text()) < 300_000


def test_the_build_of_torch_is_read_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "torch", raising=False)
    version = tmp_path / "torch" / "version.py"
    for text, kind in [
        ("cuda: Optional[str] = None\nhip: Optional[str] = None\nxpu: Optional[str] = None\n", None),
        ("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", "cuda"),
        ("cuda = None\nhip = '6.4'\n", "hip"),
    ]:
        version.write_text(f"__version__ = '2.13.0'\n{text}")
        assert devices.torch_build() == kind


@pytest.mark.gpu
def test_accelerators_are_counted_as_torch_counts_them() -> None:
    import torch

    assert devices.count_accelerators() == torch.accelerator.device_count()


def test_bytes() -> None:
    assert [machine.format_bytes(n) for n in (None, 0, 1023, 1536, 64 << 20, 400 << 30)] == [
        "unlimited",
        "0 B",
        "1023 B",
        "1.5 KiB",
        "64 MiB",
        "400 GiB",
    ]


def test_limits_of_cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "outer" / "memory.max").write_text("1000\n")
    (inner / "memory.max").write_text("max\n")
    (inner / "cpu.max").write_text("150000 100000\n")
    (inner / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(machine, "_own_cgroup", lambda: inner)
    assert machine.memory_limit_bytes() == 1000
    assert machine.oom_kills() == 2
    assert machine.memory_figures(800) == "the limit of its cgroup is 1000 B, of which the rank used 800 B"
    assert machine.usable_cores() == min(2, len(os.sched_getaffinity(0)))
    (inner / "memory.max").write_text("500\n")
    (inner / "cpu.max").write_text("max 100000\n")
    assert machine.memory_limit_bytes() == 500
    assert machine.usable_cores() == len(os.sched_getaffinity(0))
