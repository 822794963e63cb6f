"""What quantised gradients have lost, and their random numbers, are in checkpoints: a resumed run has the bits of one
that was not interrupted.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_engine
from engine import jobs

BEFORE, AFTER = 5, 4
SCHEMES: dict[str, dict[str, Any]] = {
    "stochastic": {"stage": 3},
    "error feedback": {"stage": 2, "zeropp_loco_param": {"err_beta": 0.5, "reset_T": 7}},
    "two hops": {
        "stage": 3,
        "zero_hpz_partition_size": 2,
        "zeropp_loco_param": {"err_beta": 0.5, "reset_T": 64},
    },
}


def engine_of(scheme: str) -> ds_engine.Engine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    zero = {"zero_quantized_gradients": True, "stage3_param_persistence_threshold": 0, **SCHEMES[scheme]}
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}},
        "zero_optimization": zero,
        "startup_summary": False,
    }
    return ds_engine.initialize(model, config)[0]


def train(engine: ds_engine.Engine, begin: int, end: int) -> list[float]:
    losses = []
    for step in range(begin, end):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))
        loss = (engine(x) - x.flip(1)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def save(scheme: str, folder: str) -> None:
    engine = engine_of(scheme)
    train(engine, 0, BEFORE)
    engine.save_checkpoint(folder)
    torch.save(train(engine, BEFORE, BEFORE + AFTER), f"{folder}/losses{dist.get_rank()}.pt")
    engine.destroy()


def resume(scheme: str, folder: str) -> None:
    engine = engine_of(scheme)
    train(engine, 50, 52)  # of another run: what it has lost must not stay
    engine.load_checkpoint(folder)
    assert train(engine, BEFORE, BEFORE + AFTER) == torch.load(f"{folder}/losses{dist.get_rank()}.pt")
    engine.destroy()


def resume_without(scheme: str, folder: str) -> None:
    engine = engine_of(scheme)
    train(engine, 50, 52)
    engine.load_checkpoint(folder)
    assert not engine.model_state.residuals()["errors"].get("buckets")  # type: ignore[index]
    assert all(math.isfinite(loss) for loss in train(engine, BEFORE, BEFORE + AFTER))
    engine.destroy()


@pytest.mark.parametrize(("scheme", "size"), [("stochastic", 2), ("error feedback", 2), ("two hops", 4)])
def test_a_resumed_run_has_the_same_bits(
    request: pytest.FixtureRequest, tmp_path: Path, scheme: str, size: int
) -> None:
    jobs.on_ranks(request, size, save, groups_may_stay=True, scheme=scheme, folder=str(tmp_path))
    jobs.on_ranks(request, size, resume, groups_may_stay=True, scheme=scheme, folder=str(tmp_path))


def test_on_another_number_of_ranks_errors_begin_anew(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    jobs.on_ranks(request, 2, save, scheme="error feedback", folder=str(tmp_path))
    jobs.on_ranks(request, 3, resume_without, scheme="error feedback", folder=str(tmp_path))
