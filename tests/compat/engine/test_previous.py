"""A model that `deepspeed.initialize` is given again."""

from __future__ import annotations

import gc
import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import logger
from deepspeed.utils.zero_to_fp32 import load_state_dict_from_zero_checkpoint
from torch import nn

import deepspeed
import ds_zero
from compat.engine.test_engine import Net, batch, config
from harness import ranks


def _train(engine: deepspeed.DeepSpeedEngine) -> None:
    engine.backward(engine(*batch(0, dist.get_rank())))
    engine.step()


@ranks(2)
@pytest.mark.parametrize("first", [0, 2, 3])
@pytest.mark.parametrize("how", ["dropped", "held", "destroyed"])
def test_it_goes_on_with_the_values_that_it_has(first: int, how: str) -> None:
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(listener)
    torch.manual_seed(0)
    model = Net()
    engine = deepspeed.initialize(model=model, config=config(first))[0]
    _train(engine)
    values = ds_zero.full_state_dict(model)
    held = engine if how == "held" else None
    if how == "destroyed":
        engine.destroy()
    del engine
    gc.collect()
    again = deepspeed.initialize(model=model, config=config(2))[0]
    logger.removeHandler(listener)
    assert any("has an engine already" in line for line in said) == (held is not None)
    now = ds_zero.full_state_dict(model)
    assert all(torch.equal(now[name], value) for name, value in values.items())
    before = model.head.weight.detach().clone()
    _train(again)
    assert not torch.equal(model.head.weight, before)
    again.destroy()


@ranks(2)
def test_an_engine_whose_module_was_taken_out_can_be_destroyed(tmp_path: Path) -> None:
    engine = deepspeed.initialize(model=Net(), config=config(2))[0]
    _train(engine)
    engine.save_checkpoint(tmp_path)
    values = ds_zero.full_state_dict(engine.module)
    plain: nn.Module = load_state_dict_from_zero_checkpoint(engine.module, tmp_path)
    assert all(torch.equal(plain.state_dict()[name], value) for name, value in values.items())
    engine.destroy()
    engine.destroy()
