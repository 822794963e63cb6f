"""The position in `training_data` is part of a checkpoint, and is found again on any number of ranks."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import ds_engine
from engine.jobs import on_ranks


class Samples(Dataset[torch.Tensor]):
    def __init__(self, count: int = 40) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index), 1.0])


def start(count: int = 40) -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "startup_summary": False, "seed": 5}
    config |= {"optimizer": {"type": "SGD", "params": {"lr": 1e-3}}, "zero_optimization": {"stage": 2}}
    engine, _, loader, _ = ds_engine.initialize(
        model=nn.Linear(2, 1), config=config, training_data=Samples(count)
    )
    assert engine.training_dataloader is loader
    return engine, loader


def steps(engine: Any, batches: Any, count: int) -> list[list[int]]:
    """The samples of each step, over all ranks."""
    found = []
    for _ in range(count):
        mine = []
        for batch in islice(batches, engine.gradient_accumulation_steps()):
            engine.backward(engine(batch).mean())
            engine.step()
            mine += [int(x) for x in batch[:, 0]]
        everyone: list[Any] = [None] * (dist.get_world_size() if dist.is_initialized() else 1)
        dist.all_gather_object(everyone, mine) if dist.is_initialized() else everyone.__setitem__(0, mine)
        found.append(sorted(x for share in everyone for x in share))
    return found


def save_after_three_steps(folder: Path) -> None:
    engine, loader = start()
    with engine:
        batches = iter(loader)
        first = steps(engine, batches, 3)
        engine.save_checkpoint(folder)
        then = steps(engine, batches, 2) + steps(
            engine, iter(loader), 2
        )  # the end of a pass, and the next one
        if engine.world.rank == 0:
            (folder / "seen.json").write_text(json.dumps([first, then]))


def go_on(folder: Path) -> None:
    engine, loader = start()
    with engine:
        engine.load_checkpoint(folder)
        first, then = json.loads((folder / "seen.json").read_text())
        assert steps(engine, iter(loader), 2) + steps(engine, iter(loader), 2) == then
        assert sorted(x for step in first + then[:2] for x in step) == list(range(40))


@pytest.mark.parametrize(("saved", "loaded"), [(2, 2), (2, 1), (1, 2)])
def test_exact_position_on_another_number_of_ranks(
    request: pytest.FixtureRequest, tmp_path: Path, saved: int, loaded: int
) -> None:
    on_ranks(request, saved, save_after_three_steps, folder=tmp_path)
    on_ranks(request, loaded, go_on, folder=tmp_path)


def test_other_data_begins_anew_and_says_so(tmp_path: Path) -> None:
    engine, loader = start()
    with engine:
        steps(engine, iter(loader), 1)
        engine.save_checkpoint(tmp_path)
    engine, loader = start(count=16)
    with engine:
        with pytest.warns(
            UserWarning,
            match=r"position in training_data is not restored: .* 40 samples, but now there are 16",
        ):
            engine.load_checkpoint(tmp_path)
        assert len(steps(engine, iter(loader), 2)) == 2


def test_a_checkpoint_without_a_position_leaves_the_loader_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = {
        "train_batch_size": 8,
        "startup_summary": False,
        "optimizer": {"type": "SGD", "params": {"lr": 1e-3}},
    }
    engine, *_ = ds_engine.initialize(model=nn.Linear(2, 1), config=config)
    with engine:
        engine.save_checkpoint(tmp_path)
    data = TensorDataset(torch.ones(8, 2))
    engine, _, loader, _ = ds_engine.initialize(model=nn.Linear(2, 1), config=config, training_data=data)
    with engine:
        engine.load_checkpoint(tmp_path)
        assert loader is not None and loader.state_dict()["seen"] == 0
