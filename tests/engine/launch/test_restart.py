"""`ds run --max-restarts`: which failures start a job again, on which machines, and what its ranks resume."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_engine.launch.hosts import Pool
from ds_engine.launch.plan import LaunchError
from ds_engine.launch.restart import Candidates, Restarts, UnusableHostsError, run_again
from ds_engine.launch.supervise import Outcome
from engine.launch.test_on_hosts import nothing_left, ranks_on, start
from engine.launching import Job
from harness.hosts import Network

_POOL: Pool = {"a": [0, 1], "b": [0, 1], "c": [0, 1]}


def unreachable(*hosts: str) -> UnusableHostsError:
    lines = [f"{host} cannot be used: no route" for host in hosts]
    return UnusableHostsError("\n  ".join(["the job does not start on any machine:", *lines]), hosts)


class Machines:
    """Runs attempts without machines: notes which ones each attempt was given."""

    def __init__(self, *ends: Outcome | Exception) -> None:
        self.ends = list(ends)
        self.given: list[str] = []

    def __call__(self, chosen: Pool) -> Outcome:
        self.given.append("".join(chosen))
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end


def outcomes(*codes: int, stopped: bool = False) -> Callable[[int], Outcome]:
    rest = list(codes)
    return lambda number: Outcome(code=rest.pop(0), stopped=stopped)


@pytest.mark.parametrize(
    ("codes", "limit", "code", "said"),
    [((0,), 3, 0, 0), ((1, 137, 0), 3, 0, 2), ((1, 2, 3), 2, 3, 2), ((5,), 0, 5, 0)],
)
def test_how_often_a_job_is_started_again(codes: tuple[int, ...], limit: int, code: int, said: int) -> None:
    lines: list[str] = []
    assert run_again(outcomes(*codes), Restarts(limit=limit), lines.append).code == code
    assert len(lines) == said


def test_a_job_that_was_stopped_is_not_started_again() -> None:
    assert run_again(outcomes(143, 0, stopped=True), Restarts(limit=5), print).code == 143


def test_a_lost_machine_is_left_out_once() -> None:
    lost = Outcome(code=1, lost=frozenset("b"))
    machines = Machines(lost, Outcome(code=1), Outcome(code=0))
    candidates = Candidates(_POOL, None, Restarts(limit=2, min_nodes=1), print)
    assert run_again(lambda _: candidates.attempt(machines), Restarts(limit=2), print).code == 0
    assert machines.given == ["abc", "ac", "abc"]


def test_a_spare_machine_takes_the_place_of_a_lost_one() -> None:
    machines = Machines(Outcome(code=1, lost=frozenset("a")), unreachable("b"), Outcome(code=0))
    candidates = Candidates(_POOL, 2, Restarts(limit=1, min_nodes=1), print)
    assert run_again(lambda _: candidates.attempt(machines), Restarts(limit=1), print).code == 0
    assert machines.given == ["ab", "bc", "c"]


def test_too_few_machines() -> None:
    machines = Machines(Outcome(code=1, lost=frozenset("bc")))
    candidates = Candidates(_POOL, None, Restarts(limit=1, min_nodes=2), print)
    with pytest.raises(LaunchError, match=r"1 of 3 machines are left \(b, c lost\), and the job needs 2"):
        run_again(lambda _: candidates.attempt(machines), Restarts(limit=1), print)
    with pytest.raises(LaunchError, match="--min-nodes 4 is more than the 3 machines of the job"):
        Candidates(_POOL, None, Restarts(min_nodes=4), print)
    with pytest.raises(UnusableHostsError, match="a cannot be used"):  # as many as at first are needed
        Candidates(_POOL, None, Restarts(), print).attempt(Machines(unreachable("a")))


def test_what_a_restart_cannot_mend_ends_the_job() -> None:
    other_version = UnusableHostsError("the job does not start on any machine:\n  b has ds-engine 0.0.9", [])
    with pytest.raises(UnusableHostsError, match=r"ds-engine 0\.0\.9"):
        Candidates(_POOL, None, Restarts(min_nodes=1), print).attempt(Machines(other_version))


def test_one_machine_starts_again_after_a_crash(tmp_path: Path) -> None:
    source = """
mark(f"attempt{os.environ['DS_RESTART_COUNT']}-")
assert os.environ["TORCHELASTIC_RESTART_COUNT"] == os.environ["DS_RESTART_COUNT"]
if os.environ["DS_RESTART_COUNT"] < "2" and RANK == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ["DS_RESTART_COUNT"] < "2":
    time.sleep(100)
"""
    code, _, err = Job(tmp_path, source, "-n", "2", "--max-restarts", "3", "--grace", "1").finish()
    assert code == 0, err
    assert err.count("rank 1 (pid") == 2 and "[ds] restart 2 of 3: " in err and "restart 3" not in err
    assert sorted(path.name for path in tmp_path.glob("attempt*")) == [
        f"attempt{attempt}-{rank}" for attempt in range(3) for rank in range(2)
    ]


@pytest.mark.parametrize("ends_well", [True, False])
def test_what_a_job_keeps_in_memory_stays_for_restarts_and_goes_at_its_end(
    ends_well: bool, tmp_path: Path
) -> None:
    """Found under the job's name, which is the same at every restart and different in every job."""
    source = f"""
folder = pathlib.Path(os.environ["DS_MEMORY_FOLDER"], f"ds-copies-{{os.getuid()}}-{{os.environ['DS_JOB']}}")
if os.environ["DS_RESTART_COUNT"] == "0":
    folder.mkdir()
assert folder.is_dir()
mark(f"attempt{{os.environ['DS_RESTART_COUNT']}}-")
sys.exit(0 if os.environ["DS_RESTART_COUNT"] == "2" and {ends_well} else 3)
"""
    memory = tmp_path / "memory"
    (memory / "ds-copies-0-another").mkdir(parents=True)
    job = Job(tmp_path, source, "-n", "1", "--max-restarts", "2", DS_MEMORY_FOLDER=str(memory), DS_JOB="")
    code, _, err = job.finish()
    assert code == (0 if ends_well else 3), err
    assert len(list(tmp_path.glob("attempt*"))) == 3, err
    assert [path.name for path in memory.iterdir()] == ["ds-copies-0-another"]


def test_options_that_contradict_each_other(tmp_path: Path) -> None:
    job = Job(
        tmp_path, "", "--nnodes", "2", "--node-rank", "0", "--rdzv-endpoint", "h:1", "--max-restarts", "1"
    )
    code, _, err = job.finish()
    assert code == 2 and "--max-restarts needs one launcher for all machines: use --hostfile" in err
    code, _, err = Job(tmp_path, "", "--min-nodes", "2").finish()
    assert code == 2 and "--min-nodes needs --hostfile" in err


_ELASTIC = """
import torch, ds_checkpoint, ds_engine
attempt = os.environ["DS_RESTART_COUNT"]
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 33), torch.nn.GELU(), torch.nn.Linear(33, 1))
config = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
    "zero_optimization": {"stage": 2, "rank_invariant": True},
    "startup_summary": False,
}
engine, *_ = ds_engine.initialize(model=model, config=config)
if ds_checkpoint.latest(HERE / "checkpoints"):
    engine.load_checkpoint(HERE / "checkpoints")
for step in range(engine.global_steps, 8):
    batch = torch.randn(16, 16, generator=torch.Generator().manual_seed(step)).view(2, 8, 16)
    for micro in range(engine.batch.steps):
        engine.backward(engine(batch[micro * engine.batch.ranks + RANK]).square().mean())
        engine.step()
    engine.save_checkpoint(HERE / "checkpoints", f"step{step}")
    mark(f"attempt{attempt}-step{step}-")
    if attempt == "0" and step == 3:
        wait_for("never")
if RANK == 0:
    values = {name: value.tolist() for name, value in engine.module.state_dict().items()}
    (HERE / f"weights").write_text(repr(values))
"""


def test_a_training_goes_on_without_a_lost_host(network: Network, tmp_path: Path) -> None:
    """From the newest checkpoint, on half of the ranks, to the weights of a run without the loss."""
    (tmp_path / "quiet").mkdir()
    quiet = Job(tmp_path / "quiet", _ELASTIC.replace('attempt == "0"', "False"), "-n", "2")
    options = ("--max-restarts", "1", "--min-nodes", "1", "--grace", "1")
    hostfile = "host-a slots=1\nhost-b slots=1\n"
    job = start(network, tmp_path, _ELASTIC, *options, hostfile=hostfile)
    job.pids("attempt0-step3-")
    for pid in [
        *network["host-b"].processes("ds_engine.launch.remote.agent"),
        *ranks_on(network, "host-b", job),
    ]:
        os.kill(pid, signal.SIGKILL)
    code, _, err = job.finish()
    assert code == 0, err
    assert "host-b was lost first, with rank 1: the connection ended" in err
    assert "[ds] restart 1 of 1: " in err and "[ds] without host-b: 1 machines" in err
    steps = sorted(path.name for path in tmp_path.glob("attempt1-*"))
    assert steps == [f"attempt1-step{step}-0" for step in range(4, 8)], (
        "no step is repeated and none is left out"
    )
    code, _, err = quiet.finish()
    assert code == 0, err
    assert (tmp_path / "weights").read_text() == (tmp_path / "quiet" / "weights").read_text()
    assert nothing_left(network, job)
