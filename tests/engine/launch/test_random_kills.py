"""A training whose ranks are killed again and again has the losses, and the samples, of one that nobody disturbs."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.launching import Job, until

_NEW_STEPS = 20
"""Steps after a recovery before the next kill."""
_RANKS = 2
_SOURCE = """
import json
begun = time.time()
attempt = int(os.environ["DS_RESTART_COUNT"])
mark(f"attempt{attempt}-")
import torch, ds_checkpoint, ds_engine
imported = time.time()

class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 96
    def __getitem__(self, index):
        return index, torch.randn(16, generator=torch.Generator().manual_seed(index))

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 33), torch.nn.Dropout(0.1), torch.nn.Linear(33, 1))
config = {
    "train_batch_size": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
    "zero_optimization": {"stage": 2},
    "startup_summary": False,
    "checkpoint": {"keep_last": 2},
}
engine, _, loader, _ = ds_engine.initialize(model=model, config=config, training_data=Numbers())
checkpoints = HERE / "checkpoints"
if ds_checkpoint.latest(checkpoints):
    engine.load_checkpoint(checkpoints)
log = os.open(HERE / f"log{RANK}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
steps = int(sys.argv[1])
while engine.global_steps < steps:
    for numbers, values in loader:
        loss = engine(values).square().mean()
        engine.backward(loss)
        engine.step()
        entry = {"attempt": attempt, "step": engine.global_steps, "loss": loss.item().hex()}
        entry |= {"samples": numbers.tolist(), "time": time.time(), "import_s": imported - begun}
        os.write(log, json.dumps(entry).encode() + b"\\n")
        if engine.global_steps % 5 == 0:
            engine.save_checkpoint(checkpoints)
        if engine.global_steps == steps:
            break
        time.sleep(0.01)
"""


def entries(folder: Path, rank: int) -> list[dict[str, Any]]:
    file = folder / f"log{rank}"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


class Killer:
    """Kills ranks of a job, at random."""

    def __init__(self, job: Job, seed: int) -> None:
        self.job = job
        self.random = random.Random(seed)
        self.recovery_s: list[float] = []
        """Seconds from each kill to the first new step, without the imports of the new ranks."""

    def newest(self) -> int:
        return max(
            int(file.name[len("attempt") :].partition("-")[0]) for file in self.job.folder.glob("attempt*-?")
        )

    def kill(self, attempt: int) -> None:
        pids = self.job.pids(f"attempt{attempt}-", _RANKS)
        os.kill(self.random.choice(pids), signal.SIGKILL)

    def first_step(self, after: int) -> Mapping[str, Any]:
        """Waits for a step that no rank has made before."""
        assert until(lambda: any(e["step"] > after for e in entries(self.job.folder, 0)), 180.0)
        return next(e for e in entries(self.job.folder, 0) if e["step"] > after)

    def disturb(self, *, twice: bool) -> None:
        """Waits for new steps, kills a rank, and waits until the training goes on. twice: kills a rank of the next
        start, too, before its first step.
        """
        begin = max((e["step"] for e in entries(self.job.folder, 0)), default=0)
        self.first_step(begin + _NEW_STEPS + self.random.randrange(6))
        time.sleep(self.random.uniform(0.0, 0.05))  # also in the middle of a step, or of a checkpoint
        attempt = self.newest()
        self.kill(attempt)
        killed_s = time.time()
        if twice:
            assert until(lambda: self.newest() > attempt)
            time.sleep(self.random.uniform(0.0, 2.0))
            self.kill(attempt + 1)
            killed_s = time.time()
        before = max(e["step"] for e in entries(self.job.folder, 0) if e["attempt"] <= attempt + twice)
        new = self.first_step(before)
        self.recovery_s.append(new["time"] - killed_s - new["import_s"])


def check(folder: Path, undisturbed: Path, steps: int) -> None:
    """Compares every step of every start with the undisturbed run, on every rank."""
    for rank in range(_RANKS):
        expected = {e["step"]: (e["loss"], e["samples"]) for e in entries(undisturbed, rank)}
        assert sorted(expected) == list(range(1, steps + 1))
        made = entries(folder, rank)
        assert {e["step"] for e in made} == set(expected), "no step is left out"
        for e in made:
            assert (e["loss"], e["samples"]) == expected[e["step"]], (
                f"step {e['step']} of start {e['attempt']}"
            )
        assert max(repeated(made)) <= 5 + 1, "no step before the newest checkpoint is repeated"


def repeated(made: Sequence[Mapping[str, Any]]) -> list[int]:
    """For each start, how many steps it repeats."""
    done, counts, attempt = 0, [0], 0
    for e in made:
        if e["attempt"] != attempt:
            attempt = e["attempt"]
            counts.append(done + 1 - e["step"])
        done = max(done, e["step"])
    return counts


@pytest.mark.full
@pytest.mark.parametrize("part", range(1, 11))
def test_every_kill_is_recovered(part: int, tmp_path: Path) -> None:
    """The ten parts kill 100 times, and 10 times more during a recovery."""
    kills, during_recovery = 10, 1
    steps = (kills + during_recovery) * (_NEW_STEPS + 20) + 40
    (tmp_path / "undisturbed").mkdir()
    undisturbed = Job(tmp_path / "undisturbed", _SOURCE, "-n", str(_RANKS), arguments=(str(steps),))
    err = undisturbed.process.communicate(timeout=600)[1]
    assert undisturbed.process.returncode == 0, err.decode()
    (tmp_path / "killed").mkdir()
    options = ("-n", str(_RANKS), "--max-restarts", "1000", "--grace", "2")
    said = tmp_path / "killed" / "output"
    job = Job(tmp_path / "killed", _SOURCE, *options, arguments=(str(steps),), output=said)
    killer = Killer(job, seed=part)
    twice = set(killer.random.sample(range(kills), during_recovery))
    try:
        for kill in range(kills):
            killer.disturb(twice=kill in twice)
        job.process.communicate(timeout=600)
    finally:
        job.process.kill()
    assert job.process.returncode == 0, said.read_text()
    check(tmp_path / "killed", tmp_path / "undisturbed", steps)
    slowest = sorted(killer.recovery_s)
    print(
        f"{kills} kills, recovered in {slowest[len(slowest) // 2]:.1f} s (median), {slowest[-1]:.1f} s (slowest)"
    )
