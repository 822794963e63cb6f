"""Tuning of a script: which command a trial runs, and what is made of its results. No trial is started here."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ds_engine.tune import script as scripts
from ds_engine.tune.script import Script, tune_script


class Machine:
    """Stands for the trials: throughput grows with the micro-batch until memory ends."""

    def __init__(self, limit: int = 8) -> None:
        self.limit, self.commands, self.configs = limit, [], []  # type: ignore[var-annotated]

    def __call__(self, command: Sequence[str], output: Path, timeout_s: float) -> str:
        self.commands.append(list(command))
        config = json.loads(Path(command[command.index("--deepspeed_config") + 1]).read_text())
        self.configs.append(config)
        micro, stage = config["train_micro_batch_size_per_gpu"], config["zero_optimization"]["stage"]
        if micro > self.limit:
            return "out of memory"
        latency = (1 + micro) * (1.2 if stage == 3 else 1.0)
        told = {
            "throughput": 2 * micro / latency,
            "latency": latency,
            "memory_bytes": 1000 + 10 * micro,
            "free_bytes": 10**6,
            "params_numel": 10,
            "ran": {
                "stage": stage,
                "train_micro_batch_size_per_gpu": micro,
                "gradient_accumulation_steps": 1,
            },
        }
        Path(config["autotuning"]["metric_path"]).write_text(json.dumps(told))
        return ""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    made = Machine()
    monkeypatch.setattr(scripts, "run_quietly", made)
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text("")
    return made


def tune(
    mode: str = "tune", arguments: Sequence[str] = (), base: dict[str, Any] | None = None, **section: Any
) -> int:
    config = {"train_micro_batch_size_per_gpu": "auto", "optimizer": {"type": "AdamW"}, **(base or {})}
    config["autotuning"] = {"enabled": True, "max_train_micro_batch_size_per_gpu": 64} | section
    Path("ds.json").write_text(json.dumps(config))
    arguments = ["--deepspeed_config", "ds.json", *arguments]
    return tune_script(mode, "train.py", arguments, {"here": [0, 1]}, lambda line: None)


def test_the_fastest_that_fits_is_written(machine: Machine) -> None:
    assert tune() == 0
    best = json.loads(Path("autotuning_results/ds_config_optimal.json").read_text())
    assert best["train_micro_batch_size_per_gpu"] == 8 and best["optimizer"] == {"type": "AdamW"}
    assert "autotuning" not in best and len(machine.commands) <= 8
    assert machine.configs[0]["train_micro_batch_size_per_gpu"] == 1  # the first trial is the smallest
    command = machine.commands[-1]
    assert command[1:6] == ["-m", "ds_engine", "run", "-n", "2"] and command[6] == "train.py"
    summary = json.loads(Path("autotuning_results/autotuning.json").read_text())
    assert any("out of memory" in line for line in summary["trials"])


def test_results_that_exist_are_used_again_without_overwrite(machine: Machine) -> None:
    tune()
    first = len(machine.commands)
    best = Path("autotuning_results/ds_config_optimal.json").read_text()
    tune(overwrite=False)
    failed = sum(config["train_micro_batch_size_per_gpu"] > 8 for config in machine.configs[:first])
    assert len(machine.commands) - first <= failed
    assert Path("autotuning_results/ds_config_optimal.json").read_text() == best


def test_arguments_that_repeat_a_setting_follow_it(machine: Machine) -> None:
    mapping = {"train_micro_batch_size_per_gpu": "--micro", "gradient_accumulation_steps": "--steps"}
    tune(arguments=["--micro", "1", "--steps=7"], arg_mappings=mapping, tuner_num_trials=2)
    command, config = machine.commands[-1], machine.configs[-1]
    assert command[command.index("--micro") + 1] == str(config["train_micro_batch_size_per_gpu"]) != "1"
    assert command[command.index("--steps") + 1] == "1" and "--steps=7" not in command


def test_the_folders_are_those_of_the_section(machine: Machine) -> None:
    tune(results_dir="found", exps_dir="tried", tuner_num_trials=1)
    assert Path("found/ds_config_optimal.json").is_file() and not Path("autotuning_results").exists()
    assert Path("tried/stage-0_micro-batch-1/metric.json").is_file()


def test_run_trains_with_the_answer(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        return subprocess.CompletedProcess(command, 5)

    monkeypatch.setattr(subprocess, "run", run)
    assert tune("run", fast=True) == 5
    assert ran[0][-1] == "autotuning_results/ds_config_optimal.json"
    assert {config["zero_optimization"]["stage"] for config in machine.configs} == {0}


def test_there_is_always_an_end_with_a_reason(machine: Machine) -> None:
    machine.limit = 0
    said: list[str] = []
    Path("ds.json").write_text(json.dumps({"train_batch_size": 4, "autotuning": {"enabled": True}}))
    given = ("tune", "train.py", ["--deepspeed_config=ds.json"])
    with pytest.raises(ValueError, match="one machine, and there are 2"):
        tune_script(*given, {"a": [0], "b": [0]}, said.append)
    with pytest.raises(ValueError, match="pass it as --deepspeed_config"):
        tune_script("tune", "train.py", ["--config", "gone.json"], {"here": [0]}, said.append)
    assert tune() == 1
    assert Script(name="t", arguments=("--config=ds.json",), ranks=1).config_path() == "ds.json"
