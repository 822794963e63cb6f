"""What code reads of DeepSpeed's schedules."""

from __future__ import annotations

import math

import pytest
import torch
from deepspeed.runtime.lr_schedules import OneCycle, WarmupCosineLR, WarmupLR

import ds_engine.schedules


def adam(lr: float = 0.1) -> torch.optim.Adam:
    return torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def test_attributes_of_warm_up_and_a_type_that_nobody_knows() -> None:
    schedule = WarmupCosineLR(adam(), total_num_steps=100, warmup_num_steps=10, warmup_type="unheard of")
    assert (schedule.warmup_num_steps, schedule.warmup_type) == (10, "log")
    assert schedule.get_lr_ratio() == 0.0
    schedule.step(1)
    assert schedule.get_lr_ratio() == pytest.approx(math.log(2) / math.log(10))
    assert isinstance(ds_engine.schedules.WarmupLR(adam()), WarmupLR)


def test_one_cycle_says_its_highest_momentum_first_and_begins_with_the_lowest() -> None:
    optimizer = adam()
    schedule = OneCycle(optimizer, 0.001, 0.1, cycle_first_step_size=4, cycle_min_mom=0.8, cycle_max_mom=0.9)
    assert schedule.step_ratio == 0.5 and schedule.total_size == 8
    assert schedule.get_mom() == [(0.9, 0.99)] and optimizer.param_groups[0]["betas"] == (0.8, 0.99)
    for _ in range(4):
        schedule.step()
    assert schedule.get_mom() == [(0.8, 0.99)] and optimizer.param_groups[0]["betas"] == (0.8, 0.99)
