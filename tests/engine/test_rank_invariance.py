"""`rank_invariant` through the engine: stopped on four ranks, resumed on others, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ds_engine
import ds_zero
from engine import jobs


def made(stage: int, seed: int = 0) -> ds_engine.Engine:
    config: dict[str, Any] = jobs.config(stage, gradient_clipping=0.5)
    del config["gradient_accumulation_steps"]
    config |= {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2}
    config["zero_optimization"]["rank_invariant"] = True
    engine, *_ = ds_engine.initialize(model=jobs.net(seed), config=config)
    return engine


def weights(engine: ds_engine.Engine) -> dict[str, Tensor]:
    with ds_zero.gathered(list(engine.module.parameters())):
        return {n: p.detach().clone() for n, p in engine.module.named_parameters()}


def stop(folder: Path) -> None:
    engine = made(2)
    jobs.train(engine, 5)
    engine.save_checkpoint(folder)
    jobs.train(engine, 5, first=5)
    found = weights(engine)
    if dist.get_rank() == 0:
        torch.save(found, folder / "expected.pt")


def resume(folder: Path, stage: int) -> None:
    engine = made(stage, seed=3)
    engine.load_checkpoint(folder)
    jobs.train(engine, 5, first=5)
    expected = torch.load(folder / "expected.pt")
    found = weights(engine)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("size, stage", [(1, 2), (2, 3), pytest.param(8, 1, marks=pytest.mark.full)])
def test_another_number_of_ranks_goes_on_bit_by_bit(
    request: pytest.FixtureRequest, tmp_path: Path, size: int, stage: int
) -> None:
    jobs.on_ranks(request, 4, stop, folder=tmp_path)
    jobs.on_ranks(request, size, resume, folder=tmp_path, stage=stage)
