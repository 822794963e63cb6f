"""Copies in memory on real hosts: a host ends, the disks are gone, and the job goes on."""

from __future__ import annotations

import ast
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.launch.test_on_hosts import start
from engine.launching import Job, until
from harness import hosts

_TRAINING = """
import torch, ds_engine, ds_zero
attempt, kill_at = os.environ["DS_RESTART_COUNT"], int(os.environ.get("KILL_AT", "-1"))
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 33), torch.nn.GELU(), torch.nn.Linear(33, 1))
config = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
    "zero_optimization": {"stage": STAGE, "rank_invariant": True},
    "checkpoint": {"memory_copies": {"interval": 2}},
    "startup_summary": False,
}
engine, *_ = ds_engine.initialize(model=model, config=config)
resumed = engine.resume(HERE / "checkpoints")
if RANK == 0:
    (HERE / f"resumed{attempt}").write_text(repr(resumed and (resumed[0], engine.global_steps)))
losses = {}
for step in range(engine.global_steps, 10):
    batch = torch.randn(16, 16, generator=torch.Generator().manual_seed(step)).view(4, 4, 16)
    for micro in range(engine.batch.steps):
        number = micro * engine.batch.ranks + RANK
        loss = engine(batch[number]).square().mean()
        losses[step, number] = loss.item().hex()
        engine.backward(loss)
        engine.step()
    if step == 2:
        engine.save_checkpoint(HERE / "checkpoints")
    (HERE / f"losses{attempt}-{RANK}").write_text(repr(losses))
    mark(f"attempt{attempt}-step{step}-")
    if attempt == "0" and step == kill_at:
        wait_for("never")
weights = ds_zero.full_state_dict(engine.module)
if RANK == 0:
    values = {name: value.tolist() for name, value in weights.items()}
    (HERE / "weights").write_text(repr(values))
"""


@pytest.fixture
def three_hosts(tmp_path: Path) -> Iterator[hosts.Network]:
    """Hosts that the test may end."""
    lacks = hosts.missing()
    if lacks is not None:
        pytest.skip(lacks)
    with hosts.network(tmp_path / "net", ("host-a", "host-b", "host-c")) as made:
        yield made


def losses(folder: Path, *attempts: int) -> dict[tuple[int, int], str]:
    """Step and number of the micro-batch -> loss, where attempts that repeat a step must repeat its losses."""
    values: dict[tuple[int, int], str] = {}
    for attempt in attempts:
        for file in folder.glob(f"losses{attempt}-*"):
            for key, value in ast.literal_eval(file.read_text()).items():
                assert values.setdefault(key, value) == value, f"{key} in attempt {attempt}"
    return values


def copies_on(host: hosts.Host) -> list[str]:
    return host.run("sh", "-c", "ls -d /dev/shm/ds-copies-*/* 2>/dev/null || true").split()


@pytest.mark.parametrize(
    ("stage", "machines", "lost", "options"),
    [
        # The copy of host-b's part is on host-a, which goes on alone.
        (2, 2, ["host-b"], ("--num-nodes", "2", "--min-nodes", "1")),
        pytest.param(
            3, 2, ["host-b"], ("--num-nodes", "2"), marks=pytest.mark.full, id="a spare takes its place"
        ),
        pytest.param(
            1,
            3,
            ["host-c"],
            ("--min-nodes", "1"),
            marks=pytest.mark.full,
            id="four ranks become three hosts less one",
        ),
    ],
)
def test_a_job_survives_its_host_and_all_disks(
    stage: int,
    machines: int,
    lost: list[str],
    options: tuple[str, ...],
    three_hosts: hosts.Network,
    tmp_path: Path,
) -> None:
    network, source = three_hosts, _TRAINING.replace("STAGE", str(stage))
    slots = {2: (1, 1, 1), 3: (1, 1, 2)}[machines]
    hostfile = "".join(f"host-{name} slots={count}\n" for name, count in zip("abc", slots, strict=True))
    if "--min-nodes" in options and machines == 2:
        hostfile = hostfile.replace("host-c slots=1\n", "")
    (tmp_path / "quiet").mkdir()
    (tmp_path / "job").mkdir()
    quiet = Job(tmp_path / "quiet", source, "-n", "2", DS_MEMORY_FOLDER=str(tmp_path / "quiet"))
    job = start(
        network,
        tmp_path / "job",
        source,
        "--max-restarts",
        "1",
        "--grace",
        "1",
        *options,
        hostfile=hostfile,
        KILL_AT="6",
        DS_MEMORY_FOLDER="",
    )
    job.pids("attempt0-step6-", sum(slots[:machines]))
    for name in lost:
        os.kill(network[name].pid, signal.SIGKILL)  # with all its processes, its memory and its mounts
    shutil.rmtree(tmp_path / "job" / "checkpoints")
    code, _, err = job.finish()
    assert code == 0, err
    assert f"{lost[0]} was lost first" in err and "[ds] restart 1 of 1: " in err
    path, steps = ast.literal_eval((tmp_path / "job" / "resumed1").read_text())
    assert path.startswith("/dev/shm/ds-copies-") and steps == 6, "the newest copy in memory"
    code, _, err = quiet.finish()
    assert code == 0, err
    expected = losses(tmp_path / "quiet", 0)
    assert len(expected) == 40 and losses(tmp_path / "job", 0, 1) == expected
    assert (tmp_path / "job" / "weights").read_text() == (tmp_path / "quiet" / "weights").read_text()
    assert until(
        lambda: not any(copies_on(host) for host in network.hosts.values() if host.name not in lost), 5.0
    )
