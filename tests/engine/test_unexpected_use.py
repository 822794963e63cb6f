"""What users do that nobody planned for: an error says so, or it works."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import ds_engine
import ds_zero
from engine import jobs
from harness import ranks


@ranks(2)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_loading_in_the_middle_of_an_accumulation_forgets_its_gradients(tmp_path: Path, stage: int) -> None:
    straight = jobs.engine(stage)
    jobs.train(straight, 4)
    expected = ds_zero.full_state_dict(straight.module)

    first = jobs.engine(stage)
    jobs.train(first, 2)
    first.save_checkpoint(tmp_path)
    other = jobs.engine(stage, seed=1)
    jobs.train(other, 1)
    tokens, wanted = jobs.micro_batches(other, 1)[0]
    other.backward(jobs.loss_of(other, tokens, wanted))
    other.step()
    other.load_checkpoint(tmp_path)
    jobs.train(other, 2, first=2)
    found = ds_zero.full_state_dict(other.module)
    assert all(torch.equal(found[name], value) for name, value in expected.items() if name != "seen")


@ranks(1)
def test_a_schedule_of_another_optimizer_is_refused() -> None:
    model = nn.Linear(8, 8)
    schedule = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), lr=1.0), 1)
    with pytest.raises(ds_engine.ConfigError, match="StepLR sets the learning rates of another optimizer"):
        ds_engine.initialize(
            model=model,
            config={k: v for k, v in jobs.config().items() if k != "scheduler"},
            lr_scheduler=schedule,
        )


@ranks(1)
def test_training_data_of_less_than_a_micro_batch_is_refused() -> None:
    data = torch.utils.data.TensorDataset(torch.zeros(3, 8))
    with pytest.raises(ValueError, match=r"training_data has 3 samples.*fewer than one micro-batch of 8"):
        ds_engine.initialize(
            model=nn.Linear(8, 8), config=jobs.config(dataloader_drop_last=True), training_data=data
        )
    _, _, loader, _ = ds_engine.initialize(model=nn.Linear(8, 8), config=jobs.config(), training_data=data)
    assert loader is not None and [len(x) for (x,) in loader] == [3]
