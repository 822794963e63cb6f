"""Ranks that describe different jobs are told so at once, on every rank, with each rank's value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_engine
from engine import jobs
from harness import ranks

Different = Callable[[int], dict[str, Any]]


def adam(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "AdamW", "params": {"lr": 0.01, **params}}}


DIFFERENT: list[tuple[Different, str]] = [
    (lambda r: adam(lr=0.01 * (1 + r)), "optimizer.params.lr is 0.01 on rank 0 and 0.02 on rank 1"),
    (lambda r: adam(betas=[0.9, 0.99 if r else 0.999]), "is (0.9, 0.999) on rank 0 and (0.9, 0.99) on rank 1"),
    (lambda r: {"gradient_clipping": 1.0 + r}, "gradient_clipping is 1.0 on rank 0 and 2.0 on rank 1"),
    (lambda r: {"zero_optimization": {"stage": 1 + r}}, "zero_optimization.stage is 1 on rank 0 and 2 on rank 1"),
    (
        lambda r: {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4 + r}}},
        "scheduler.params.warmup_num_steps is 4 on rank 0 and 5 on rank 1",
    ),
    (
        lambda r: {"scheduler": {"type": "WarmupLR"}} if r else {"scheduler": None},
        "scheduler is None on rank 0 and 'WarmupLR' on rank 1",
    ),
    (lambda r: {"gradient_accumulation_steps": 1 + r}, "gradient_accumulation_steps is 1 on rank 0 and 2 on rank 1"),
    (lambda r: {"bf16": {"enabled": r == 1}}, "bf16.enabled is False on rank 0 and True on rank 1"),
]  # fmt: skip


@ranks(2)
@pytest.mark.parametrize("number", range(len(DIFFERENT)))
def test_settings_that_differ_are_named(number: int) -> None:
    different, said = DIFFERENT[number]
    with pytest.raises(ds_engine.ConfigError) as caught:
        jobs.engine(0, **different(dist.get_rank()))
    assert said in str(caught.value) and "ranks differ" in str(caught.value)
    # Nothing was begun: the next attempt, alike on all ranks, works.
    jobs.engine(1).destroy()


@ranks(2)
def test_what_is_passed_is_compared_too() -> None:
    def start(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        settings = jobs.config(2, optimizer=None, scheduler=None)
        engine, *_ = ds_engine.initialize(model, settings, optimizer=optimizer)
        engine.destroy()

    def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1, **options)

    rank = dist.get_rank()
    model = jobs.net()
    with pytest.raises(
        ds_engine.ConfigError, match=r"param_groups\[0\]\.momentum is 0\.0 on rank 0 and 0\.5 on rank 1"
    ):
        start(model, sgd(model, momentum=0.5 * rank))
    with pytest.raises(ds_engine.ConfigError, match=r"optimizer is torch.optim.sgd.SGD on rank 0 and .*Adam"):
        start(model, torch.optim.Adam(model.parameters(), lr=0.1) if rank else sgd(model))
    other = nn.Linear(3 + rank, 2)
    with pytest.raises(
        ds_engine.ConfigError, match=r"model is Linear with 8 parameters .* on rank 0 and .* 10 param"
    ):
        start(other, sgd(other))


@ranks(2)
def test_what_a_rank_reports_is_its_own_affair() -> None:
    rank = dist.get_rank()
    engine = jobs.engine(1, steps_per_print=7 * rank, wall_clock_breakdown=rank == 1)
    assert engine.progress.every == 7 * rank
    engine.destroy()
