"""Curriculum and layer dropping: what forward is told at each step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_engine
from ds_engine.config import ConfigError, load
from ds_engine.pacing import Pacing, discrete, growing, keep_share

LINEAR = {
    "enabled": True,
    "min_difficulty": 8,
    "max_difficulty": 64,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 10, "difficulty_step": 8},
}


def test_linear_and_root_reach_the_end_in_multiples() -> None:
    linear = [growing(step, low=8, high=64, total=10, multiple=8) for step in range(1, 13)]
    assert linear == [8, 16, 24, 24, 32, 40, 40, 48, 56, 64, 64, 64]
    root = [growing(step, low=8, high=64, total=10, multiple=8, degree=2) for step in range(1, 11)]
    assert root[0] == 24 and root[-1] == 64 and root == sorted(root)
    assert all(a >= b for a, b in zip(root, linear, strict=False))


def test_discrete_and_layers() -> None:
    assert [discrete(step, [1, 2, 3], [5, 10]) for step in (1, 5, 6, 10, 11, 99)] == [1, 1, 2, 2, 3, 3]
    assert keep_share(0, 0.5, 0.1) == 1.0
    assert keep_share(10, 0.5, 0.1) == pytest.approx(0.5 + 0.5 / math.e)
    assert keep_share(10**6, 0.5, 0.1) == 0.5


class Told(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 1), list[dict[str, Any]]()

    def forward(self, x: Tensor, **told: Any) -> Tensor:
        self.calls.append(told)
        return self.linear(x)  # type: ignore[no-any-return]


def test_the_engine_tells_forward_in_training_only() -> None:
    config = {"train_batch_size": 4, "gradient_accumulation_steps": 2, "startup_summary": False}
    config |= {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "curriculum_learning": LINEAR}
    config |= {"progressive_layer_drop": {"enabled": True, "theta": 0.5, "gamma": 0.1}}
    model = Told()
    engine, *_ = ds_engine.initialize(model=model, config=config)
    with engine:
        for _ in range(4):
            engine.backward(engine(torch.ones(2, 4)).mean())
            engine.step()
        engine.eval()
        engine(torch.ones(2, 4))
    assert [told.get("curriculum_seqlen") for told in model.calls] == [8, 8, 16, 16, None]
    assert [told.get("pld_theta") for told in model.calls] == [1.0, 1.0, *[keep_share(1, 0.5, 0.1)] * 2, None]
    assert model.calls[0]["progressive_layer_drop"] is True and model.calls[-1] == {}


def pacing(**more: Any) -> Pacing:
    return Pacing(load({"train_batch_size": 1, "curriculum_learning": LINEAR | more}))


def test_custom_schedules_come_from_code() -> None:
    custom = pacing(schedule_type="custom", schedule_config={})
    with pytest.raises(ValueError, match="set_difficulty"):
        custom.arguments(0)
    custom.set_difficulty(lambda step: 3 * step)
    assert custom.arguments(1) == {"curriculum_seqlen": 6}
    with pytest.raises(ValueError, match=r"curriculum_learning.enabled is false"):
        Pacing(load({"train_batch_size": 1})).set_difficulty(lambda step: step)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"min_difficulty": None}, "give min_difficulty and max_difficulty"),
        ({"min_difficulty": 65}, "min_difficulty 65 is above max_difficulty 64"),
        ({"schedule_config": {"difficulty_step": 8}}, "fixed_linear needs total_curriculum_step"),
        ({"schedule_type": "fixed_root"}, "fixed_root needs root_degree"),
        (
            {
                "schedule_type": "fixed_discrete",
                "schedule_config": {"difficulty": [1, 2], "max_step": [1, 2]},
            },
            "2 difficulties need 1 max_step",
        ),
    ],
)
def test_numbers_that_are_missing_or_contradict(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pacing(**more)
