"""`ds_engine.launch.notebook`: a function on several ranks, its results, and what is raised when a rank fails."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ds_engine.launch import RankFailedError, notebook
from ds_engine.launch.plan import LaunchError
from ds_engine.launch.supervise import Patience
from engine.launch import interactive_jobs as jobs
from engine.launching import clean_environ


@pytest.fixture(autouse=True)
def _environ(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in set(os.environ) - set(clean_environ()):
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_results_of_all_ranks_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    results = notebook(jobs.summed, 2, 2.0)
    shared = {"sum": 22.0, "by": "notebook", "threads": "1"}
    assert results == [{"rank": 0, **shared}, {"rank": 1, **shared}]
    out, err = capsys.readouterr()
    assert "hello from 0\n" in out and "[rank 1] hello from 1\n" in out
    assert "to stderr\n" in err and "[rank 1] to stderr\n" in err


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(
    ("kind", "error", "says"),
    [
        ("value", ValueError, "nobody expects 42"),
        ("odd", RankFailedError, "OddError: 1 and 2"),
        ("kill", RankFailedError, "rank 1 .*SIGKILL"),
        ("code", SystemExit, "3"),
    ],
)
def test_the_first_failure_is_raised_and_no_rank_is_left(
    kind: str, error: type[BaseException], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=f"(?s){says}") as caught:
        notebook(jobs.failing, 2, kind, str(tmp_path), patience=Patience(settle_s=0.1, grace_s=5))
    if kind == "value":
        cause = caught.value.__cause__
        assert isinstance(cause, RankFailedError)
        assert str(cause).startswith("on rank 1 of 2:\nTraceback") and "in failing" in str(cause)
    assert all(gone(int((tmp_path / f"pid{rank}").read_text())) for rank in range(2))


def test_results_that_do_not_arrive() -> None:
    with pytest.raises((AttributeError, pickle.PicklingError), match=r"unpicklable\.<locals>"):
        notebook(jobs.unpicklable, 1)
    with pytest.raises(RankFailedError, match=r"without a result .*not call sys\.exit"):
        notebook(jobs.leaving, 1)


def test_what_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LaunchError, match="0 ranks: at least one"):
        notebook(jobs.summed, 0)
    with pytest.raises(LaunchError, match="cannot be sent to the ranks"):
        notebook(jobs.summed, 1, threading.Lock())
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(LaunchError, match=r"is defined in this session.*pip install cloudpickle"):
        notebook(lambda: 1, 1)
    errors: list[BaseException] = []

    def elsewhere() -> None:
        try:
            notebook(jobs.summed, 1, 1.0)
        except LaunchError as error:
            errors.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "main thread only" in str(errors[0])


def ran(source: str, folder: Path, *, prompt: bool) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(source)
    command = [sys.executable, "-i", "-q"] if prompt else [sys.executable, str(script)]
    return subprocess.run(
        command,
        input=source if prompt else "",
        capture_output=True,
        text=True,
        cwd=folder,
        env={**clean_environ(), "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )


FUNCTION = """import os
from ds_engine.launch import notebook
def rank(): return int(os.environ["RANK"]) + 1

"""


def test_functions_of_a_script(tmp_path: Path) -> None:
    done = ran(
        f"{FUNCTION}if __name__ == '__main__':\n    print('got', notebook(rank, 2))\n", tmp_path, prompt=False
    )
    assert done.stdout == "got [1, 2]\n", done.stderr
    unguarded = ran(f"{FUNCTION}print('got', notebook(rank, 1))\n", tmp_path, prompt=False)
    assert unguarded.returncode == 1 and "below `if __name__ == '__main__':`" in unguarded.stderr


def test_functions_of_a_prompt(tmp_path: Path) -> None:
    done = ran(f"{FUNCTION}print('got', notebook(rank, 2))\n", tmp_path, prompt=True)
    try:
        import cloudpickle  # noqa: F401
    except ImportError:
        assert "pip install cloudpickle" in done.stderr
    else:
        assert "got [1, 2]" in done.stdout, done.stderr


def test_an_interrupt_ends_the_ranks(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import os, signal, time\n"
        "from ds_engine.launch import notebook\n"
        "def rank():\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    try:\n"
        "        notebook(rank, 1)\n"
        "    except KeyboardInterrupt:\n"
        "        print('interrupted')\n"
    )
    command = [sys.executable, "script.py"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=clean_environ(), stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout is not None
        pid = int(job.stdout.readline())
        job.send_signal(signal.SIGINT)
        assert job.stdout.read() == "interrupted\n"
    assert job.returncode == 0 and gone(pid)
