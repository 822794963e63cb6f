"""A backward that did not begin at a loss of the engine is named before the step; those of the engine are not."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import ds_engine
from engine import jobs
from harness import ranks


def engine(stage: int) -> ds_engine.Engine:
    torch.manual_seed(0)
    settings = {k: v for k, v in jobs.config(stage).items() if k != "scheduler"}
    return ds_engine.initialize(model=nn.Linear(8, 8), config=settings | {"gradient_accumulation_steps": 2})[
        0
    ]


def losses(made: ds_engine.Engine) -> tuple[Tensor, Tensor]:
    out = made(torch.ones(8, 8))
    return out.square().mean(), out.abs().mean()


@ranks(2)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_loss_that_goes_backward_by_itself_is_named(stage: int) -> None:
    made = engine(stage)
    one, other = losses(made)
    made.backward(one, retain_graph=True)
    other.backward()
    with pytest.warns(UserWarning, match=r"1 of 2 backwards since the last step did not begin at a loss of"):
        made.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.backward(losses(made)[0])
        made.step()  # warned once
    made.destroy()


@ranks(2)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_losses_of_the_engine_pass(stage: int) -> None:
    made = engine(stage)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            one, other = losses(made)
            made.backward(one, retain_graph=True)
            scaled = made.scale(other)
            scaled.backward(retain_graph=True)
            scaled.backward()
            made.step()
        made.optimizer.zero_grad()
        made.backward(losses(made)[0])
        made.step()
    made.destroy()
