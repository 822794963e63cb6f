"""`ds run` with real processes: what ranks are given, what becomes of their output, and how jobs end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ds_engine import __version__
from ds_engine.cli.main import app
from ds_engine.launch.local import prepare
from ds_engine.launch.machine import usable_cores
from ds_engine.launch.plan import LaunchError
from engine.launching import Job, clean_environ, gone, until

_REPORT = """
import json
names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"]
report = {"argv": sys.argv[1:], **{name: os.environ[name] for name in names}}
(HERE / f"report{RANK}").write_text(json.dumps(report))
"""


def test_what_ranks_are_given(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("{}")
    arguments = ("--config", "mine", "--nproc", "9", "--help", "--", "-x")
    job = Job(tmp_path, _REPORT, "--nproc", "3", "--config", "c.json", arguments=arguments)
    code, _, err = job.finish()
    assert code == 0, err
    reports = [json.loads((tmp_path / f"report{rank}").read_text()) for rank in range(3)]
    for rank, report in enumerate(reports):
        assert report["argv"] == ["--config", "c.json", *arguments]
        assert report["RANK"] == report["LOCAL_RANK"] == str(rank)
        assert report["WORLD_SIZE"] == report["LOCAL_WORLD_SIZE"] == "3"
        assert report["MASTER_ADDR"] == "127.0.0.1"
        assert report["OMP_NUM_THREADS"] == str(max(1, usable_cores() // 3))
    assert len({report["MASTER_PORT"] for report in reports}) == 1


def test_the_users_threads_are_kept(tmp_path: Path) -> None:
    assert Job(tmp_path, _REPORT, "--nproc", "1", OMP_NUM_THREADS="7").finish()[0] == 0
    assert json.loads((tmp_path / "report0").read_text())["OMP_NUM_THREADS"] == "7"


def test_a_module(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "job.py").write_text("import sys; print(__name__, sys.argv[1:])")
    command = [sys.executable, "-m", "ds_engine", "run", "--nproc", "1", "--module", "package.job", "-x"]
    out = subprocess.check_output(
        command, cwd=tmp_path, env=clean_environ(), stderr=subprocess.DEVNULL, text=True
    )
    assert out == "__main__ ['-x']\n"


def test_output_of_rank_0_is_its_own_and_that_of_others_has_a_prefix(tmp_path: Path) -> None:
    source = """
print("out", RANK)
sys.stderr.write("10%\\r20%\\r30%\\nlast")
assert RANK == 0 or sys.stdin.read() == ""
if RANK == 0:
    print(sys.stdin.read())
"""
    code, out, err = Job(tmp_path, source, "--nproc", "2").finish("typed")
    assert code == 0
    assert sorted(out.splitlines()) == ["[rank 1] out 1", "out 0", "typed"]
    assert "10%\r20%\r30%\nlast" in err.replace("[rank 1] 30%\n", "").replace("[rank 1] last\n", "")
    assert "[rank 1] 30%\n" in err
    assert "[rank 1] last\n" in err


def test_output_is_not_held_back(tmp_path: Path) -> None:
    job = Job(tmp_path, 'print("first"); wait_for("go")', "--nproc", "2")
    assert job.process.stdout is not None
    lines = {job.process.stdout.readline() for _ in range(2)}
    (tmp_path / "go").touch()
    assert lines == {b"first\n", b"[rank 1] first\n"}
    assert job.finish()[0] == 0


def test_rank_0_has_the_terminal(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    (tmp_path / "script.py").write_text(
        "import os, sys; r = os.environ['RANK']\n"
        "open(f'tty{r}', 'w').write(str([s.isatty() for s in (sys.stdin, sys.stdout, sys.stderr)]))\n"
        "sys.stderr.write('bar\\rBAR\\n')\n"
    )
    command = [sys.executable, "-m", "ds_engine", "run", "--nproc", "2", "script.py"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=clean_environ(), stdin=theirs, stdout=theirs, stderr=theirs
    ) as run:
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 4096)
            except OSError:  # nobody holds the other end any more
                break
        assert run.wait(30) == 0
    os.close(ours)
    assert (tmp_path / "tty0").read_text() == "[True, True, True]"
    assert (tmp_path / "tty1").read_text() == "[False, False, False]"
    assert b"bar\rBAR\r\n" in shown  # one translation of the line's end, not two


def test_an_exception_on_one_rank_ends_all(tmp_path: Path) -> None:
    source = """
mark("up")
if RANK == 1:
    wait_for("up0")
    raise KeyError("the cause")
time.sleep(100)
"""
    job = Job(tmp_path, source, "--nproc", "2")
    pids = job.pids("up")
    code, _, err = job.finish()
    assert code == 1
    assert f"[ds] rank 1 (pid {pids[1]}) failed first: exit code 1\n" in err
    assert "[ds]   KeyError: 'the cause'\n" in err
    assert "rank 0 was terminated by the launcher" in err
    assert "[ds] what to do: fix the error above" in err
    assert all(gone(pid) for pid in pids)


def test_the_first_to_fail_is_named_even_if_its_victim_ends_first(tmp_path: Path) -> None:
    source = """
if RANK == 1:
    atexit.register(time.sleep, 100)  # slow to shut down, as a process with GPUs and threads is
    atexit.register(mark, "failed")
    raise KeyError("the cause")
wait_for("failed1")
raise RuntimeError("gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:54475")
"""
    code, _, err = Job(tmp_path, source, "--nproc", "2").finish()
    assert code == 1
    assert ") failed first: an exception" in err
    assert "[ds] rank 1 (pid" in err
    assert "[ds]   KeyError: 'the cause'\n" in err
    assert "the other ranks: rank 0 exit code 1" in err


def test_a_broken_collective_is_not_the_cause(tmp_path: Path) -> None:
    source = """
import torch.distributed as dist, ds_comm
ds_comm.start(device="cpu", timeout_s=60)
dist.barrier()
if RANK == 1:
    raise KeyError("the cause")
dist.barrier()
"""
    code, _, err = Job(tmp_path, source, "--nproc", "2").finish()
    assert code == 1
    assert "[ds] rank 1 (pid" in err
    assert "[ds]   KeyError: 'the cause'\n" in err
    assert "[rank1]:" not in err  # torch's own prefix, once is enough


def test_exit_codes_are_handed_on(tmp_path: Path) -> None:
    code, _, err = Job(tmp_path, "print('why', file=sys.stderr); sys.exit(7 * RANK)", "--nproc", "2").finish()
    assert code == 7
    assert "failed first: exit code 7" in err
    assert "[ds] the end of its stderr:\n[ds]   why\n" in err
    assert "rank 0 had finished" in err
    assert "ended without a traceback" in err


def test_kill_9_of_a_rank(tmp_path: Path) -> None:
    job = Job(tmp_path, 'mark("up"); time.sleep(100)', "--nproc", "2")
    pids = job.pids("up")
    os.kill(pids[1], signal.SIGKILL)
    code, _, err = job.finish()
    assert code == 128 + signal.SIGKILL
    assert f"rank 1 (pid {pids[1]}) failed first: killed by SIGKILL" in err
    assert re.search(
        r"out of memory: the (limit of its cgroup is|machine has) .*, of which the rank used \d", err
    )
    assert "out of memory" in err
    assert "train_micro_batch_size_per_gpu" in err
    assert all(gone(pid) for pid in pids)


def test_a_crash_in_native_code(tmp_path: Path) -> None:
    code, _, err = Job(tmp_path, "import ctypes; ctypes.string_at(0)", "--nproc", "1").finish()
    assert code == 128 + signal.SIGSEGV
    assert "failed first: killed by SIGSEGV" in err
    assert "Fatal Python error: Segmentation fault" in err  # faulthandler is switched on
    assert "what to do: native code crashed" in err


def test_a_rank_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    source = """
signal.signal(signal.SIGTERM, lambda *_: mark("asked"))
mark("up")
if RANK == 1:
    wait_for("up0")
    sys.exit(3)
while True:
    time.sleep(1)
"""
    job = Job(tmp_path, source, "--nproc", "2", "--grace", "0.3")
    pids = job.pids("up")
    assert job.finish()[0] == 3
    assert (tmp_path / "asked0").exists()
    assert gone(pids[0])


def test_what_ranks_started_ends_with_them(tmp_path: Path) -> None:
    source = """
ignores = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(100)"
child = subprocess.Popen([sys.executable, "-c", ignores])
(HERE / f"child{RANK}").write_text(str(child.pid))
os._exit(5 * RANK)
"""
    assert Job(tmp_path, source, "--nproc", "2").finish()[0] == 5
    children = [int((tmp_path / f"child{rank}").read_text()) for rank in range(2)]
    assert until(lambda: all(gone(pid) for pid in children), 5.0)


def test_kill_9_of_the_launcher_ends_the_ranks(tmp_path: Path) -> None:
    job = Job(
        tmp_path, 'signal.signal(signal.SIGTERM, signal.SIG_IGN); mark("up"); time.sleep(100)', "--nproc", "2"
    )
    pids = job.pids("up")
    job.process.kill()
    assert until(lambda: all(gone(pid) for pid in pids), 5.0)
    job.finish()


def test_kill_9_of_the_launcher_ends_what_ranks_started(tmp_path: Path) -> None:
    source = """
(HERE / f"child{RANK}").write_text(str(subprocess.Popen(["sleep", "100"]).pid))
mark("up")
time.sleep(100)
"""
    job = Job(tmp_path, source, "--nproc", "2")
    pids = job.pids("up")
    pids += [int((tmp_path / f"child{rank}").read_text()) for rank in range(2)]
    job.process.kill()
    assert until(lambda: all(gone(pid) for pid in pids), 5.0)
    job.finish()


_SAVES = """
try:
    mark("up")
    while True:
        time.sleep(0.1)  # a signal just before a long sleep would be handled after it
except KeyboardInterrupt:
    time.sleep(0.2)
    mark("saved")
"""


def test_ctrl_c_lets_ranks_save(tmp_path: Path) -> None:
    job = Job(tmp_path, _SAVES, "--nproc", "2")
    pids = job.pids("up")
    job.process.send_signal(signal.SIGINT)
    code, _, err = job.finish()
    assert code == 128 + signal.SIGINT
    assert (tmp_path / "saved0").exists()
    assert (tmp_path / "saved1").exists()
    assert "[ds] SIGINT: forwarded to 2 ranks" in err
    assert "stopped by SIGINT; no rank is left" in err
    assert "failed first" not in err
    assert all(gone(pid) for pid in pids)


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    source = 'signal.signal(signal.SIGINT, lambda *_: mark("first"))\nmark("up")\nwhile True: time.sleep(1)'
    job = Job(tmp_path, source, "--nproc", "2", "--stop-grace", "100")
    pids = job.pids("up")
    job.process.send_signal(signal.SIGINT)
    job.pids("first")
    job.process.send_signal(signal.SIGINT)
    code, _, err = job.finish()
    assert code == 128 + signal.SIGINT
    assert "SIGINT again: terminating the ranks at once" in err
    assert all(gone(pid) for pid in pids)


def test_sigterm_is_handed_on_and_waited_for_only_so_long(tmp_path: Path) -> None:
    source = 'signal.signal(signal.SIGTERM, lambda *_: mark("told"))\nmark("up")\nwhile True: time.sleep(1)'
    job = Job(tmp_path, source, "--nproc", "2", "--stop-grace", "0.5")
    pids = job.pids("up")
    job.process.terminate()
    assert job.finish()[0] == 128 + signal.SIGTERM
    assert (tmp_path / "told0").exists()
    assert (tmp_path / "told1").exists()
    assert all(gone(pid) for pid in pids)


def test_sigusr1_is_handed_on_and_the_job_goes_on(tmp_path: Path) -> None:
    source = 'signal.signal(signal.SIGUSR1, lambda *_: mark("told"))\nmark("up")\nwait_for("go")'
    job = Job(tmp_path, source, "--nproc", "2")
    job.pids("up")
    job.process.send_signal(signal.SIGUSR1)
    job.pids("told")
    (tmp_path / "go").touch()
    assert job.finish()[0] == 0


@pytest.mark.parametrize(
    ("script", "options", "environ", "message"),
    [
        ("nope.py", {}, {}, r"there is no file 'nope.py' in .* \(there: here.py\)"),
        ("-x", {}, {}, "options of `ds run` must come before the script"),
        ("no.such", {"module": True}, {}, "there is no module 'no.such'"),
        ("here.py", {"config": "nope.json"}, {}, "--config nope.json: there is no such file"),
        ("here.py", {"nproc": 0}, {}, "--nproc 0: at least one process"),
        (
            "here.py",
            {},
            {"SLURM_STEP_NUM_TASKS": "8"},
            "srun has already started 8 .*`srun python script.py`",
        ),
        ("here.py", {}, {"OMPI_COMM_WORLD_SIZE": "2"}, "`mpirun python script.py`"),
    ],
)
def test_what_cannot_start(
    script: str,
    options: dict[str, Any],
    environ: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "here.py").write_text("raise SystemExit('started')")
    monkeypatch.chdir(tmp_path)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=message):
        prepare(script, [], **{"nproc": None, "module": False, "config": None, **options})


def test_what_cannot_start_ends_with_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ds_engine", "run", "nope.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=clean_environ(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("[ds] cannot start: there is no file 'nope.py'")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--include a", "--include needs --hostfile"),
        ("--num-nodes 2 --export X", "--export, --num-nodes needs --hostfile"),
        ("--hostfile h --nnodes 2", "--nnodes cannot be combined with --hostfile"),
        ("--node-rank 0", "--node-rank needs --nnodes"),
        ("--nnodes 2 --node-rank 0 --rdzv-endpoint a:1 --master-port 5", "--master-port cannot be combined"),
        ("--show 3", "--show 3: `all` and `0` are possible"),
        ("--hostfile nowhere", "--hostfile nowhere: there is no such file"),
    ],
)
def test_options_that_do_not_fit(
    options: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.py").write_text("raise SystemExit('started')")
    done = CliRunner().invoke(app, ["run", *options.split(), "x.py"])
    assert done.exit_code == 2
    assert f"[ds] cannot start: {message}" in done.stderr


def test_a_host_file_with_this_machine_only(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    source = "print(os.environ['MASTER_ADDR'], os.environ['CUDA_VISIBLE_DEVICES'], os.getppid())"
    job = Job(tmp_path, source, "--hostfile", str(tmp_path / "hosts"))
    _, out, _ = job.finish()
    line = f"127.0.0.1 0,1 {job.process.pid}"  # without an agent
    assert sorted(out.splitlines()) == [line, f"[rank 1] {line}"]


def test_the_launcher_does_not_import_torch() -> None:
    source = (
        "import sys, ds_engine.cli, ds_engine.launch.local as local\n"
        "local.prepare(sys.executable, [], nproc=None, module=False, config=None)\n"
        "print(sorted({'torch', 'numpy', 'pydantic', 'ds_comm', 'ds_core'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", source], env=clean_environ(), capture_output=True, text=True, check=False
    )
    assert done.stdout == "[]\n", done.stderr


def test_the_command_knows_its_version() -> None:
    out = subprocess.check_output([sys.executable, "-m", "ds_engine", "--version"], text=True)
    assert out == f"ds {__version__}\n"
