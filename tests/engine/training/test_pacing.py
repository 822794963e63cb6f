"""Curriculum and layer dropping: what forward is told at each step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_engine
from ds_engine.config import ConfigError, load
from ds_engine.training.pacing import Pacing, discrete, growing, keep_share

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
        ({"min_difficulty": None}, "set min_difficulty and max_difficulty"),
        ({"min_difficulty": 65}, "min_difficulty 65 is above max_difficulty 64"),
        ({"schedule_config": {"difficulty_step": 8}}, "fixed_linear needs total_curriculum_step"),
        ({"schedule_type": "fixed_root"}, "fixed_root needs root_degree"),
        (
            {
                "schedule_type": "fixed_discrete",
                "schedule_config": {"difficulty": [1, 2], "max_step": [1, 2]},
            },
            "2 difficulties need 1 values of max_step",
        ),
    ],
)
def test_numbers_that_are_missing_or_contradict(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pacing(**more)


# --- data_efficiency.data_routing


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(4, 4), list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape[1])
        return x + self.linear(x)


def routing(**more: Any) -> dict[str, Any]:
    schedule = {"min_value": 2, "max_value": 8, "schedule_config": {"require_steps": 3, "seq_per_step": 2}}
    section = {"enabled": True, "random_ltd_layer_id": [1, 2], "random_ltd_schedule": schedule} | more
    return {"data_efficiency": {"enabled": True, "data_routing": {"enabled": True, "random_ltd": section}}}


@pytest.mark.parametrize("stage", [0, 3])
def test_middle_layers_see_a_growing_number_of_tokens(stage: int) -> None:
    config = {"train_batch_size": 4, "startup_summary": False, "zero_optimization": {"stage": stage}}
    config |= {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}} | routing(total_layer_num=4)
    model = nn.Sequential(*[Block() for _ in range(4)])
    engine, *_ = ds_engine.initialize(model=model, config=config)
    with engine:
        with pytest.raises(ValueError, match="layers that drop tokens are not set"):
            engine(torch.ones(4, 8, 4))
        engine.pacing.drop_tokens(engine.module, Block)
        for _ in range(5):
            engine.backward(engine(torch.randn(4, 8, 4)).square().mean())
            engine.step()
        engine.eval()
        engine(torch.ones(4, 8, 4))
    model.train()
    model(torch.ones(4, 8, 4))  # of no engine any more
    assert [block.seen for block in model] == [[8] * 7, *[[2, 4, 6, 8, 8, 8, 8]] * 2, [8] * 7]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"random_ltd_layer_id": []}, "needs random_ltd_layer_id"),
        ({"random_ltd_layer_num": 3}, "is not the number of layers in random_ltd_layer_id"),
        ({"random_ltd_schedule": {"min_value": 3}}, "needs min_value, max_value"),
        (
            {"layer_token_lr_schedule": {"enabled": True}},
            "learning rates that follow the number of processed tokens",
        ),
    ],
)
def test_what_random_ltd_needs(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load({"train_batch_size": 4} | routing(**more))


def test_layers_that_are_not_those_of_the_configuration() -> None:
    model = nn.Sequential(Block(), Block())
    with pytest.raises(ValueError, match=r"2 layers Block; .* indices start at 0"):
        Pacing(load({"train_batch_size": 4} | routing())).drop_tokens(model, Block)
    with pytest.raises(ValueError, match="random_ltd is not enabled"):
        Pacing(load({"train_batch_size": 4})).drop_tokens(model, Block)


def test_multiples_do_not_begin_below_the_minimum() -> None:
    assert [growing(step, low=8, high=64, total=10, multiple=16) for step in (1, 3, 10)] == [16, 16, 64]
    assert growing(1, low=10, high=12, total=10, multiple=16) == 12
