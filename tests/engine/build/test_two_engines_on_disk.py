"""Two engines of one process, with their state in one folder, do not disturb each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ds_engine
from harness import ranks


def engine(seed: int, stage: int, folder: Path | None) -> ds_engine.Engine:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    disk: dict[str, Any] = {"device": "nvme", "nvme_path": str(folder)} if folder else {"device": "none"}
    zero = {"stage": stage, "offload_optimizer": disk, **({"offload_param": disk} if stage == 3 else {})}
    config = {
        "train_batch_size": 4,
        "bf16": {"enabled": True},
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": zero,
        "startup_summary": False,
    }
    return ds_engine.initialize(model=model, config=config)[0]


def step(trained: ds_engine.Engine, number: int) -> float:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(number)).bfloat16()
    loss = (trained(x) - x).float().square().mean()
    trained.backward(loss)
    trained.step()
    return loss.item()


@pytest.mark.parametrize("stage", [1, 3])
def test_their_steps_may_alternate(stage: int, tmp_path: Path) -> None:
    expected = []
    for seed in (0, 1):
        with engine(seed, stage, None) as alone:
            expected.append([step(alone, number) for number in range(4)])
    (tmp_path / "swap").mkdir()
    both = [engine(seed, stage, tmp_path / "swap") for seed in (0, 1)]
    losses: list[list[float]] = [[], []]
    for number in range(4):
        for own, trained in zip(losses, both, strict=True):
            own.append(step(trained, number))
        if number == 1:
            both[0].save_checkpoint(tmp_path / "saved")
    assert losses == expected
    both[0].destroy()
    step(both[1], 4)  # its files are still there
    both[1].destroy()


@ranks(2)
def test_ranks_may_use_different_disks(tmp_path: Path) -> None:
    own = tmp_path / f"disk {torch.distributed.get_rank()}"
    own.mkdir()
    losses = []
    for folder in (None, own):
        with engine(0, 3, folder) as trained:
            losses.append([step(trained, number) for number in range(3)])
    assert losses[0] == losses[1]
