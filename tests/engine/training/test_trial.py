"""A trial of the autotuner ends by itself, and says what it measured and what really ran."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_engine


def train(section: dict[str, Any], steps: int) -> int:
    """Steps that were trained until the engine ended the training."""
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": 1},
        "startup_summary": False,
        "autotuning": section,
    }
    engine, *_ = ds_engine.initialize(model=torch.nn.Linear(4, 1), config=config)
    with engine:
        for _ in range(2 * steps):
            engine.backward(engine(torch.ones(2, 4)).square().mean())
            engine.step()
    return engine.global_steps


def test_it_ends_after_the_measured_steps_with_the_result(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metric.json"
    section = {"enabled": True, "metric_path": str(path), "start_profile_step": 2, "end_profile_step": 4}
    with pytest.raises(SystemExit) as ended:
        train(section, 5)
    assert ended.value.code == 0
    told = json.loads(path.read_text())
    assert told["throughput"] == pytest.approx(4 / told["latency"]) and told["params_numel"] == 5
    assert told["memory_bytes"] > 10 << 20 and told["free_bytes"] > 0
    ran = told["ran"]
    assert (ran["stage"], ran["train_micro_batch_size_per_gpu"], ran["train_batch_size"]) == (1, 2, 4)
    path.unlink()
    assert train(section, 3) == 3 and not path.exists()  # step 4 is the last that is measured


def test_without_a_metric_path_or_turned_off_training_goes_on(tmp_path: Path) -> None:
    assert train({"enabled": True}, 6) == 6
    assert train({"enabled": False, "metric_path": str(tmp_path / "m.json")}, 6) == 6
