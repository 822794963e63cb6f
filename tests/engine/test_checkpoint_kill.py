"""kill -9 of one or all ranks at random moments of saving: the newest complete checkpoint loads each time.

10 kills by default, 50 with DS_FULL=1. A job of two ranks saves without pause, under new tags and over the
newest one, and prunes; so that most of its time is spent inside a save. It is killed after a random number of
saves plus a random part of the next one; every second kill waits for the moment of a commit.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ds_engine import checkpoint
from ds_engine.checkpoint import Checkpoint
from engine.kill_writer import NUMEL, RANKS

KILLS = 50 if os.environ.get("DS_FULL") == "1" else 10


class Jobs:
    """Our end of kill_writer.py."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("kill_writer.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.pids: list[int] = []

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def receive(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "kill_writer.py has ended"
        return line.strip()

    def start(self, rendezvous: Path, root: Path, number: int) -> list[int]:
        """Numbers of saves that have returned already."""
        self.send(f"{rendezvous} {root} {number}")
        early = []
        while not (said := self.receive()).startswith("pids "):
            early.append(int(said))  # the ranks were faster than the process that forked them
        self.pids = [int(pid) for pid in said.split()[1:]]
        return early

    def kill(self, victims: list[int]) -> list[int]:
        """Kill these ranks, and the others a moment later; the numbers of saves that had returned and were
        not received yet."""
        for rank in victims:
            os.kill(self.pids[rank], signal.SIGKILL)
        time.sleep(0.05)  # for a survivor to go on with what it was doing
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number still means the same process
        self.pids = []
        self.send("reap")
        returned = []
        while (line := self.receive()) != "reaped":
            returned.append(int(line))
        return returned

    def close(self) -> None:
        if self.pids:
            self.kill([0, 1])
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


def wait_for_commit(root: Path) -> None:
    """Return when a save has everything written and is about to give it its name: the moment that matters
    most."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if any((path / "manifest.json").exists() for path in root.glob("*.tmp-*")):
                return
    raise AssertionError("nothing was saved for 30 s")


@pytest.fixture
def job() -> Iterator[Jobs]:
    made = Jobs()
    yield made
    made.close()


def newest_number(root: Path) -> int | None:
    """Load what a restarted job would load, whole and verified; the number of the save that it is from."""
    tag = checkpoint.latest(root)
    if tag is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = checkpoint.find(root, None)
    with Checkpoint(path) as opened:
        assert list(opened.verify()) == []
        number = int(opened.manifest.values["number"])
        for name in "abcd":
            assert torch.equal(opened.tensor(name), torch.full((RANKS * NUMEL,), number))
    return number


@pytest.mark.slow
def test_the_newest_complete_checkpoint_loads_after_every_kill(tmp_path: Path, job: Jobs) -> None:
    chance = random.Random(0)
    root = tmp_path / "run"
    number = 0
    interrupted = 0
    for attempt in range(KILLS):
        reported = job.start(tmp_path / f"meet{attempt}", root, number)
        reported += [int(job.receive()) for _ in range(chance.randrange(1, 6))]
        if attempt % 2:
            wait_for_commit(root)
            time.sleep(chance.random() * 0.002)
        else:
            time.sleep(chance.random() * 0.03)
        reported += job.kill(chance.choice([[0], [1], [0, 1]]))
        found = newest_number(root)
        assert found is not None and found >= max(reported), f"save {max(reported)} had returned, {found} is "
        "what loads"
        interrupted += any(".tmp-" in p.name or ".old-" in p.name for p in root.iterdir())
        assert (
            len(checkpoint.folder.complete(root)) <= 5
        )  # pruning is not behind by more than the interrupted saves
        number = found
    # The moments were well chosen: most kills interrupted a save.
    assert interrupted >= KILLS // 3
