"""Starting `ds run` on small scripts, for the tests of the launcher."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Every script begins with this: RANK, HERE (its folder), and `mark(name)`, which leaves a file with the process id.
_PRELUDE = """
import atexit, os, pathlib, signal, subprocess, sys, time
RANK = int(os.environ["RANK"])
HERE = pathlib.Path(__file__).parent
def mark(name):
    partial = HERE / f"{name}{RANK}.partial"
    partial.write_text(str(os.getpid()))
    partial.rename(HERE / f"{name}{RANK}")
def wait_for(name):
    while not (HERE / name).exists():
        time.sleep(0.01)
"""


class Job:
    """A running `ds run`; `finish` gives its exit code and what it printed."""

    def __init__(
        self,
        folder: Path,
        source: str,
        *options: str,
        arguments: tuple[str, ...] = (),
        prefix: tuple[str, ...] = (),
        module: tuple[str, ...] = ("ds_engine", "run"),
        output: Path | None = None,
        **environ: str,
    ):
        """prefix: of the command, for example `nsenter ...`. module: the launcher. output: a file for all that it
        prints, where that is more than a pipe holds before `finish` reads it.
        """
        self.folder = folder
        (folder / "script.py").write_text(_PRELUDE + source)
        command = [sys.executable, "-m", *module, *options, str(folder / "script.py"), *arguments]
        sink = None if output is None else output.open("wb")
        self.process = subprocess.Popen(
            [*prefix, *command],
            cwd=folder,
            env={**clean_environ(), **environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if sink is None else sink,
            stderr=subprocess.PIPE if sink is None else subprocess.STDOUT,
            start_new_session=True,
        )
        if sink is not None:
            sink.close()

    def finish(self, stdin: str = "") -> tuple[int, str, str]:
        """Exit code, stdout, stderr (with line ends as they were written)."""
        out, err = self.process.communicate(stdin.encode(), timeout=60)
        return self.process.returncode, out.decode(), err.decode()

    def pids(self, name: str, num_ranks: int = 2) -> list[int]:
        """Process ids of the ranks, once all have called `mark(name)`."""
        files = [self.folder / f"{name}{rank}" for rank in range(num_ranks)]
        assert until(lambda: all(file.exists() for file in files) or self.process.poll() is not None, 60.0)
        assert all(file.exists() for file in files), self.finish()
        return [int(file.read_text()) for file in files]


def clean_environ() -> dict[str, str]:
    """Ours, without what the process of the tests happens to have from a launcher."""
    hidden = (
        "OMP_NUM_THREADS",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    return {name: value for name, value in os.environ.items() if name not in hidden}


def until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Waits for `condition`; whether it became true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


def gone(pid: int) -> bool:
    """Whether the process is no more (a zombie, which waits for its parent, counts as gone)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
