"""Whole weights out of checkpoints: by all ranks at once, again, by others' converters, into the engine's module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import (
    convert_zero_checkpoint_to_fp32_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
    get_model_state_file,
    get_optim_files,
    load_state_dict_from_zero_checkpoint,
)
from torch import nn

import deepspeed
from harness import ranks


def trained(stage: int, folder: Path) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage},
        "startup_summary": False,
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.backward(engine(torch.ones(1, 8)).square().mean())
    engine.step()
    engine.save_checkpoint(folder, tag="one", client_state={"epoch": 3})
    return engine


@ranks(2)
@pytest.mark.parametrize("stage", [0, 3])
def test_all_ranks_convert_at_once_and_again_and_load_into_the_module(stage: int, tmp_path: Path) -> None:
    engine = trained(stage, tmp_path)
    whole = get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    for _ in range(2):
        convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "whole")
        dist.barrier()
    written = torch.load(tmp_path / "whole" / "pytorch_model.bin", weights_only=True)
    assert all(torch.equal(written[name], value) for name, value in whole.items())
    assert [f.name for f in (tmp_path / "whole").iterdir()] == ["pytorch_model.bin"]
    plain = load_state_dict_from_zero_checkpoint(engine.module, tmp_path)
    assert all(torch.equal(value, whole[name]) for name, value in plain.state_dict().items())
    assert plain(torch.ones(1, 8)).isfinite().all()


@ranks(1)
def test_converters_that_read_the_originals_files_find_stage_and_client_state(tmp_path: Path) -> None:
    trained(2, tmp_path).destroy()
    (optimizer,) = get_optim_files(tmp_path / "one")
    assert torch.load(optimizer, weights_only=False)["optimizer_state_dict"]["zero_stage"] == 2
    assert torch.load(get_model_state_file(tmp_path / "one", 2), weights_only=False)["epoch"] == 3
    with pytest.raises(FileNotFoundError, match="optim_states"):
        get_optim_files(tmp_path / "nothing")
    with pytest.raises(ValueError, match="zero_stage is 4"):
        get_model_state_file(tmp_path / "one", 4)
