"""Whole runs of pytest: in parallel, and ended from outside."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from harness.test_pool import _ends

_TESTS = Path(__file__).resolve().parent.parent

_FEW = """
import pathlib, torch, torch.distributed as dist, pytest
from harness import ranks

@ranks(2)
@pytest.mark.parametrize("i", range(6))
def test_sum(i):
    x = torch.ones(i + 1)
    dist.all_reduce(x)
    assert x.sum() == 2 * (i + 1)

@ranks(2)
def test_one_rank_fails():
    assert dist.get_rank() == 0, "this is rank 1"

@ranks(2)
def test_all_ranks_skip():
    pytest.skip("no such device")
"""

_SLOW = """
import os, pathlib, time
from harness import ranks

@ranks(2)
def test_sleeps():
    pathlib.Path(os.environ["PID_FOLDER"], str(os.getpid())).touch()
    time.sleep(1000)
"""


def _pytest(folder: Path, source: str, *options: str, **environ: str) -> subprocess.Popen[str]:
    (folder / "test_it.py").write_text(source)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        os.devnull,
        "-p",
        "no:cacheprovider",
        "-o",
        f"pythonpath={_TESTS}",
    ]
    return subprocess.Popen(
        [*command, *options, "test_it.py"],
        cwd=folder,
        env={**os.environ, **environ, "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_under_xdist(tmp_path: Path) -> None:
    run = _pytest(tmp_path, _FEW, "-n", "2", "--import-mode=importlib")
    output, _ = run.communicate(timeout=120)
    assert re.search(r"1 failed, 6 passed, 1 skipped", output), output
    assert "rank 1 of 2 failed: AssertionError: this is rank 1" in output


def _started_sleepers(tmp_path: Path) -> tuple[subprocess.Popen[str], list[int]]:
    folder = tmp_path / "pids"
    folder.mkdir()
    run = _pytest(tmp_path, _SLOW, PID_FOLDER=str(folder))
    deadline = time.monotonic() + 60.0
    while len(list(folder.iterdir())) < 2 and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [int(path.name) for path in folder.iterdir()]
    assert len(pids) == 2, run.communicate()[0]
    return run, pids


def test_nothing_is_left_when_pytest_is_killed(tmp_path: Path) -> None:
    run, pids = _started_sleepers(tmp_path)
    parents = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in pids}
    run.kill()
    assert all(_ends(pid) for pid in [*pids, *parents])
    run.communicate(timeout=30)  # nobody holds its output open


def test_ctrl_c_ends_the_ranks(tmp_path: Path) -> None:
    run, pids = _started_sleepers(tmp_path)
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=30)
    assert "KeyboardInterrupt" in output
    assert all(_ends(pid) for pid in pids)
