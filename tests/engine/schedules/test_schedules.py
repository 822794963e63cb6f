"""Rates are the written functions of the step; states come back; mistakes are named."""

from __future__ import annotations

import argparse
import math
from typing import Any

import pytest
import torch

from ds_engine import schedules
from ds_engine.config import ConfigError


def optimizer(*rates: float) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in rates or (0.1,)]
    return torch.optim.SGD(groups, lr=0.1)


def run(kind: str, params: dict[str, Any], steps: int, *rates: float) -> list[list[float]]:
    """Rates of the groups at each of the first `steps` optimizer steps."""
    made = optimizer(*rates)
    schedule = schedules.build(kind, params, made)
    seen = []
    for _ in range(steps):
        seen.append([g["lr"] for g in made.param_groups])
        schedule.step()
        assert schedule.get_last_lr() == [g["lr"] for g in made.param_groups]
    return seen


def test_warmup_linear() -> None:
    seen = run("WarmupLR", {"warmup_max_lr": 1.0, "warmup_num_steps": 4, "warmup_type": "linear"}, 8)
    # The first step runs before the schedule has moved.
    assert [lr for (lr,) in seen] == pytest.approx([0, 0, 0.25, 0.5, 0.75, 1, 1, 1])


def test_warmup_log_takes_each_groups_own_rate() -> None:
    seen = run("warmuplr", {"warmup_num_steps": 10}, 13, 0.1, 0.2)
    shares = [0, *(math.log(t + 1) / math.log(10) for t in range(10)), 1, 1]
    for (low, high), share in zip(seen, shares, strict=True):
        assert low == pytest.approx(0.1 * share)
        assert high == pytest.approx(0.2 * share)


def test_decay_falls_in_a_line_to_the_end() -> None:
    params = {"total_num_steps": 12, "warmup_num_steps": 4, "warmup_max_lr": 1.0, "warmup_type": "linear"}
    seen = [lr for (lr,) in run("WarmupDecayLR", params, 16)]
    assert seen[5:14] == pytest.approx([1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])
    assert seen[14:] == [0, 0]


def test_cosine_ends_at_the_floor_and_stays() -> None:
    params = {"total_num_steps": 12, "warmup_num_steps": 4, "cos_min_ratio": 0.1, "warmup_type": "linear"}
    seen = [lr for (lr,) in run("WarmupCosineLR", params, 16, 2.0)]
    assert seen[:5] == pytest.approx([0, 0, 0.5, 1.0, 1.5])
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * n / 8)) / 2 for n in range(1, 9)]
    assert seen[5:13] == pytest.approx([2.0 * ratio for ratio in cosine])
    assert seen[13:] == pytest.approx([0.2] * 3)


def test_warmup_ratio_is_where_warmup_starts() -> None:
    params = {"total_num_steps": 9, "warmup_num_steps": 4, "warmup_min_ratio": 0.5, "warmup_type": "linear"}
    seen = [lr for (lr,) in run("WarmupCosineLR", params, 5, 1.0)]
    assert seen == pytest.approx([0, 0.5, 0.625, 0.75, 0.875])


def test_range_test_rises_without_end() -> None:
    params = {"lr_range_test_min_lr": 0.1, "lr_range_test_step_size": 2, "lr_range_test_step_rate": 0.5}
    seen = [lr for (lr,) in run("LRRangeTest", params, 5)]
    assert seen == pytest.approx([0.1 * (1 + 0.5 * t / 2) for t in range(5)])
    stairs = [lr for (lr,) in run("LRRangeTest", {**params, "lr_range_test_staircase": True}, 5)]
    assert stairs == pytest.approx([0.1, 0.1, 0.15, 0.15, 0.2])


CYCLE = {"cycle_min_lr": 1.0, "cycle_max_lr": 5.0, "cycle_first_step_size": 4, "cycle_momentum": False}


def test_one_cycle_rises_falls_and_decays() -> None:
    params = {**CYCLE, "cycle_second_step_size": 2, "decay_step_size": 2, "decay_lr_rate": 1.0}
    seen = [lr for (lr,) in run("OneCycle", params, 11)]
    assert seen[:7] == pytest.approx([1, 2, 3, 4, 5, 3, 1])
    assert seen[7:] == pytest.approx([1 / 1.5, 1 / 2, 1 / 2.5, 1 / 3])
    assert [lr for (lr,) in run("OneCycle", CYCLE, 12)][8:] == [1, 1, 1, 1]


def test_one_cycle_in_stairs() -> None:
    seen = [lr for (lr,) in run("OneCycle", {**CYCLE, "cycle_first_stair_count": 2}, 9)]
    assert seen == pytest.approx([1, 1, 3, 3, 5, 3, 3, 1, 1])


def test_one_cycle_moves_the_first_beta_the_other_way() -> None:
    made = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    params = {**CYCLE, "cycle_momentum": True, "decay_step_size": 1, "decay_mom_rate": 0.1}
    schedule = schedules.build("OneCycle", params, made)
    seen = []
    for _ in range(10):
        seen.append(made.param_groups[0]["betas"][0])
        assert made.param_groups[0]["betas"][1] == 0.99
        schedule.step()
    assert seen[1:9] == pytest.approx([0.875, 0.85, 0.825, 0.8, 0.825, 0.85, 0.875, 0.9])
    assert seen[9] == pytest.approx(0.99)


def test_one_cycle_says_that_there_is_no_momentum_to_move() -> None:
    with pytest.warns(UserWarning, match="cycle_momentum has no effect, because SGD has no betas"):
        schedules.build("OneCycle", {**CYCLE, "cycle_momentum": True}, optimizer())


def test_a_rate_that_is_a_tensor_stays_one() -> None:
    rate = torch.tensor(0.1)
    made = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    schedules.build("WarmupLR", {"warmup_num_steps": 4, "warmup_type": "linear"}, made).step(2)
    assert made.param_groups[0]["lr"] is rate and rate.item() == pytest.approx(0.05)


def test_a_schedule_from_the_command_line() -> None:
    parser = schedules.add_tuning_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--lr_schedule", "OneCycle", "--cycle_max_lr", "0.5", "--cycle_momentum"])
    section, why = schedules.get_config_from_args(args)
    assert section is not None and why is None
    assert section["params"]["cycle_max_lr"] == 0.5 and section["params"]["cycle_min_lr"] == 0.01
    assert "cycle_second_step_size" not in section["params"]  # left to the schedule
    made = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    assert isinstance(schedules.build(section["type"], section["params"], made), schedules.OneCycle)
    args = parser.parse_args(["--lr_schedule", "WarmupCosineLR", "--total_num_steps", "9"])
    section, _ = schedules.get_config_from_args(args)
    assert section is not None and section["params"]["total_num_steps"] == 9
    assert schedules.check(section["type"], section["params"]) == []
    assert schedules.get_config_from_args(parser.parse_args([]))[0] is None
    assert "not a supported" in str(
        schedules.get_config_from_args(parser.parse_args(["--lr_schedule", "X"]))[1]
    )


@pytest.mark.parametrize("kind", ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest"])
def test_a_loaded_schedule_goes_on(kind: str) -> None:
    params: dict[str, Any] = {"warmup_num_steps": 3} | ({} if kind == "WarmupLR" else {"total_num_steps": 9})
    if not kind.startswith("Warmup"):
        params = CYCLE if kind == "OneCycle" else {"lr_range_test_step_size": 2}
    straight = run(kind, params, 8)
    first = optimizer()
    schedule = schedules.build(kind, params, first)
    for _ in range(4):
        schedule.step()
    second = optimizer()
    resumed = schedules.build(kind, params, second)
    resumed.load_state_dict(schedule.state_dict())
    rest = []
    for _ in range(4):
        rest.append([g["lr"] for g in second.param_groups])
        resumed.step()
    assert rest == straight[4:]


def test_schedules_of_torch_by_name() -> None:
    made = optimizer()
    schedule = schedules.build("steplr", {"step_size": 2, "gamma": 0.5}, made)
    assert isinstance(schedule, torch.optim.lr_scheduler.StepLR)


@pytest.mark.parametrize(
    ("kind", "params", "wanted"),
    [
        (
            "WarmUpLRR",
            {},
            'scheduler.type is "WarmUpLRR": there is no such schedule. Did you mean "WarmupLR"?',
        ),
        ("WarmupLR", {"warmup_steps": 3}, "scheduler.params.warmup_steps: WarmupLR has no such argument"),
        ("WarmupLR", {"warmup_num_stesp": 3}, 'Did you mean "warmup_num_steps"?'),
        ("WarmupLR", {"warmup_num_steps": 0}, "warmup_num_steps is 0: it must be an integer of at least 1"),
        ("WarmupLR", {"warmup_type": "exp"}, "warmup_type is 'exp'"),
        ("WarmupLR", {"warmup_min_lr": [0.0, 0.1]}, "warmup_min_lr has 2 values, the optimizer has 1 groups"),
        ("WarmupCosineLR", {}, "scheduler.params.total_num_steps is missing"),
        ("LRRangeTest", {"lr_range_test_step_size": 0}, "lr_range_test_step_size is 0"),
        ("OneCycle", {"cycle_min_lr": 0.1}, "scheduler.params.cycle_max_lr is missing"),
        (
            "OneCycle",
            {"cycle_min_lr": 0.1, "cycle_max_lr": 1.0, "cycle_first_step_size": 0},
            "the first must be more than 0",
        ),
        ("WarmupCosineLR", {"total_num_steps": 0}, "total_num_steps is 0"),
        ("ReduceLROnPlateau", {}, "there is no such schedule"),
    ],
)
def test_mistakes(kind: str, params: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        schedules.build(kind, params, optimizer())
    assert wanted in str(caught.value)


def test_a_warmup_longer_than_the_run_warns() -> None:
    with pytest.warns(UserWarning, match="total_num_steps 5 is less than warmup_num_steps 10"):
        schedules.build("WarmupCosineLR", {"total_num_steps": 5, "warmup_num_steps": 10}, optimizer())
