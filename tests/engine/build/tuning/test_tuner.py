"""`ds tune`: what it writes, what it goes on from, and that a trial runs what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from typer.testing import CliRunner

from ds_engine.build.tuning import trial as trials
from ds_engine.build.tuning import tuner
from ds_engine.cli.main import app
from ds_engine.tune import Candidate, Outcome

FACTORY = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8)), torch.zeros(2, 64)
"""
RATES = {"flops_per_s": 1e9, "memory_bytes_per_s": 1e9, "link": {"latency_s": 1e-5, "bytes_per_s": 1e8}}


def ds_tune(folder: Path, *arguments: str, **config: Any) -> tuple[int, str]:
    (folder / "job.py").write_text(FACTORY)
    (folder / "rates.json").write_text(json.dumps(RATES))
    base = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW"}, "gradient_clipping": 1.0}
    (folder / "ds.json").write_text(json.dumps(base | config))
    command = ["tune", "--config", str(folder / "ds.json"), "--model", f"{folder / 'job.py'}:make", "-n", "2"]
    command += [
        "--out",
        str(folder / "tuning"),
        "--rates",
        str(folder / "rates.json"),
        "--max-micro-batch",
        "4",
    ]
    result = CliRunner().invoke(app, [*command, *arguments])
    return result.exit_code, result.output


def pretend(monkeypatch: pytest.MonkeyPatch) -> list[Candidate]:
    """Trials that need no process: stage 2 is fastest, stage 3 fails. Returns what was tried."""
    tried: list[Candidate] = []

    def run(candidate: Candidate, spec: trials.Spec, *, ranks: int, timeout_s: float) -> Outcome:
        assert ranks == 2 and spec.config["zero_optimization"]["stage"] == candidate.stage
        assert spec.config["gradient_clipping"] == 1.0
        tried.append(candidate)
        if candidate.stage == 3:
            return Outcome(candidate=candidate, samples_per_s=None, reason="RuntimeError: no")
        return Outcome(candidate=candidate, samples_per_s=100.0 * candidate.micro + 10 * candidate.stage)

    monkeypatch.setattr(tuner, "run_trial", run)
    return tried


def test_the_winner_is_written_with_its_reasons_and_a_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = pretend(monkeypatch)
    code, text = ds_tune(tmp_path, "--trials", "2")
    assert code == 0 and len(tried) == 2, text
    with (tmp_path / "tuning" / "trials.jsonl").open("a") as file:
        file.write('{"job": "cut')  # killed while it wrote
    code, text = ds_tune(tmp_path, "--trials", "4")
    assert code == 0 and len(set(tried)) == len(tried) <= 4 and text.count("tried before") == 2
    result = json.loads((tmp_path / "tuning" / "tuning.json").read_text())
    best = json.loads((tmp_path / "tuning" / "ds_config.json").read_text())
    assert best == result["best"] and best["train_micro_batch_size_per_gpu"] == 4
    assert best["zero_optimization"]["stage"] == max(one.stage for one in tried if one.stage < 3)
    assert "samples/s measured" in result["why"][0] and len(result["predictions"]) == 12
    before = len(tried)
    ds_tune(tmp_path, "--trials", "1", gradient_clipping=1.0, fp16={"enabled": False})
    assert len(tried) == before + 1  # another configuration: earlier trials say nothing about it


def test_a_job_that_cannot_fit_ends_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = pretend(monkeypatch)
    code, text = ds_tune(tmp_path, "--budget", "100KB")
    assert code == 1 and not tried and "nothing fits: stage" in text and "the budget is 97.7 KiB" in text
    assert json.loads((tmp_path / "tuning" / "tuning.json").read_text())["best"] is None


def test_limits_of_the_section_autotuning_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = pretend(monkeypatch)
    section = {"fast": True, "max_train_micro_batch_size_per_gpu": 2, "tuner_num_trials": 7, "enabled": True}
    code, _ = ds_tune(tmp_path, "--max-micro-batch", "2", autotuning=section, zero_optimization={"stage": 1})
    assert code == 0 and {one.stage for one in tried} == {1} and max(one.micro for one in tried) == 2
    for limits in (
        {"min_train_micro_batch_size_per_gpu": 2, "max_train_batch_size": 4},
        {"min_train_batch_size": 8},
    ):
        result = tmp_path / "tuning" / "tuning.json"
        result.unlink()
        code, _ = ds_tune(tmp_path, "--trials", "1", autotuning=limits)
        wanted = {"micro-batch 2"} if len(limits) == 2 else {"micro-batch 4"}
        rows = json.loads(result.read_text())["predictions"]
        assert code == 0 and {row["candidate"].partition(", ")[2] for row in rows} == wanted
    code, text = ds_tune(tmp_path, train_micro_batch_size_per_gpu=None, train_batch_size=3)
    assert code == 2 and "not a multiple of 2 ranks" in text


DIVIDED = """
import torch
from torch import nn

def make(ep_size=1):
    import ds_moe

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.moe = ds_moe.MoE(32, lambda: ds_moe.FeedForward(32, 64), 4, ep_size, k=1, use_rts=False)

        def forward(self, x):
            return self.moe(x)[0].square().mean()

    return Net(), torch.zeros(2, 8, 32)
"""


def test_degrees_and_buckets_are_in_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[Candidate, trials.Spec]] = []

    def run(candidate: Candidate, spec: trials.Spec, *, ranks: int, timeout_s: float) -> Outcome:
        tried.append((candidate, spec))
        return Outcome(candidate=candidate, samples_per_s=100.0 * candidate.expert)

    monkeypatch.setattr(tuner, "run_trial", run)
    if dist.is_initialized():
        dist.destroy_process_group()
    (tmp_path / "moe.py").write_text(DIVIDED)
    arguments = ("--model", f"{tmp_path / 'moe.py'}:make", "--parallel", "--buckets", "1000,100000")
    code, text = ds_tune(tmp_path, *arguments, "--trials", "20", zero_optimization={"stage": 1})
    rows = json.loads((tmp_path / "tuning" / "tuning.json").read_text())["predictions"]
    names = [row["candidate"] for row in rows if row["fits"]]
    assert code == 0 and len(names) == 4 * 3 * 2 * 2, text
    assert (
        sum("expert 2" in name for name in names) == sum("buckets of 1,000" in name for name in names) == 24
    )
    for candidate, spec in tried:
        assert spec.arguments == ({"ep_size": 2} if candidate.expert == 2 else {})
        assert spec.config["zero_optimization"]["reduce_bucket_size"] == candidate.bucket
    # Each rank holds half of the experts.
    memory = {row["candidate"]: row["memory_bytes"] for row in rows}
    plain = "stage 0, micro-batch 1, buckets of 100,000"
    assert memory["stage 0, micro-batch 1, expert 2, buckets of 100,000"] < 0.7 * memory[plain]
    code, text = ds_tune(tmp_path, "--buckets", "many")
    assert code == 2 and "--buckets many: write numbers" in " ".join(text.split())


def test_a_trial_says_what_really_ran(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(FACTORY)
    candidate = Candidate(stage=2, micro=3, steps=2, recompute=True)
    spec = trials.Spec(
        config=candidate.config({"optimizer": {"type": "AdamW"}, "train_batch_size": 77}),
        model=f"{tmp_path / 'job.py'}:make",
        tokens=None,
        recompute=True,
        arguments={},
        warm_up=1,
        steps=2,
        out="",
    )
    told = trials.train(spec)
    ran = told["ran"]
    assert told["samples_per_s"] == pytest.approx(6 / ran["step_s"])
    assert (ran["stage"], ran["train_batch_size"], ran["gradient_accumulation_steps"]) == (2, 6, 2)
    assert ran["train_micro_batch_size_per_gpu"] == 3 and ran["ranks"] == 1 and ran["recompute"]


@pytest.mark.full
def test_the_whole_search_with_real_trials(tmp_path: Path) -> None:
    code, text = ds_tune(tmp_path, "--trials", "2", "--timeout", "120")
    result = json.loads((tmp_path / "tuning" / "tuning.json").read_text())
    assert code == 0 and result["trials"][0]["ran"]["ranks"] == 2, text


@pytest.mark.full
def test_a_failing_trial_is_an_outcome_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text("def make():\n    raise MemoryError('no')\n")
    spec = trials.Spec(
        config={"train_batch_size": 1, "optimizer": {"type": "AdamW"}},
        model=f"{tmp_path / 'job.py'}:make",
        tokens=None,
        recompute=False,
        arguments={},
        warm_up=0,
        steps=1,
        out=str(tmp_path / "out.json"),
    )
    candidate = Candidate(stage=0, micro=1, steps=1)
    outcome = trials.run_trial(candidate, spec, ranks=1, timeout_s=100)
    assert outcome.samples_per_s is None and outcome.out_of_memory


@pytest.mark.full
def test_the_search_beside_trying_everything() -> None:
    """On a quiet machine `ci/bench tune` shows 0.97 for five jobs; here other tests run beside it."""
    bench = Path(__file__).parents[4] / "ci" / "bench_tune.py"
    command = [sys.executable, str(bench), "--jobs", "deep", "--rounds", "1", "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)
    result = json.loads(done.stdout[done.stdout.index("\n{") :])["deep"]
    assert result["candidates"] == 12 and result["trials"] <= 5 and result["of the best"] >= 0.8
