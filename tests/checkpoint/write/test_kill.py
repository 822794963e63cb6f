"""kill -9 of one or all ranks at random moments of saving: the newest complete checkpoint loads each time.

A job of two ranks saves without pause, at once or in the background, under new tags and over the newest one, and
prunes; so that most of its time is spent inside a save. It is killed after a random number of saves plus a random
part of the next one; every second kill waits for the moment of a commit. 10 kills by default; the marker `full` adds
1000, in four directories side by side.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import ds_checkpoint as checkpoint
from checkpoint.write.kill_writer import NUMEL, RANKS
from ds_checkpoint import Checkpoint
from ds_checkpoint.format.folder import complete

LANES = 4
"""Jobs that are killed side by side; their directories are their own."""


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

    def start(self, how: str, rendezvous: Path, root: Path, number: int) -> list[int]:
        """Numbers of saves that are complete already."""
        self.send(f"{how} {rendezvous} {root} {number}")
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


def newest_number(root: Path) -> int | None:
    """Load what a restarted job would load, whole and verified; the number of the save that it is from."""
    tag = checkpoint.latest(root)
    if tag is None:
        return None
    with Checkpoint(checkpoint.find(root, None)) as opened:
        assert list(opened.verify()) == []
        number = int(opened.manifest.values["number"])
        for name in "abcd":
            assert torch.equal(opened.tensor(name), torch.full((RANKS * NUMEL,), number))
    return number


def kill_again_and_again(folder: Path, how: str, kills: int, seed: int) -> int:
    """How many of the kills interrupted a save; each time what a restarted job would load is whole, and not older
    than what was complete."""
    chance = random.Random(seed)
    folder.mkdir()
    root = folder / "run"
    root.mkdir()
    number = 0
    interrupted = 0
    with contextlib.closing(Jobs()) as job:
        for attempt in range(kills):
            reported = job.start(how, folder / f"meet{attempt}", root, number)
            reported += [int(job.receive()) for _ in range(chance.randrange(1, 6))]
            if attempt % 2:
                wait_for_commit(root)
                time.sleep(chance.random() * 0.002)
            else:
                time.sleep(chance.random() * 0.03)
            reported += job.kill(chance.choice([[0], [1], [0, 1]]))
            found = newest_number(root)
            if max(reported) > 0:  # in the background the first number says that nothing is complete yet
                assert found is not None and found >= max(reported), (
                    f"{max(reported)} was complete, not {found}"
                )
            interrupted += any(".tmp-" in p.name or ".old-" in p.name for p in root.iterdir())
            # Pruning is not behind by more than the interrupted saves.
            assert len(complete(root)) <= 5
            number = found or 0
    return interrupted


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*'latest':UserWarning")  # killed between the two renames
@pytest.mark.parametrize("how", ["now", "background"])
def test_the_newest_complete_checkpoint_loads_after_every_kill(tmp_path: Path, how: str) -> None:
    # The moments were well chosen: most kills interrupted a save.
    assert kill_again_and_again(tmp_path / how, how, 5, seed=0) >= 1


@pytest.mark.full
@pytest.mark.parametrize("how", ["now", "background"])
def test_five_hundred_kills_several_at_once(tmp_path: Path, how: str) -> None:
    warnings.simplefilter("ignore")
    kills = 500 // LANES
    with ThreadPoolExecutor(LANES) as lanes:
        runs = [
            lanes.submit(kill_again_and_again, tmp_path / f"lane{i}", how, kills, seed=i + 1)
            for i in range(LANES)
        ]
        assert sum(run.result() for run in runs) >= LANES * kills // 3
