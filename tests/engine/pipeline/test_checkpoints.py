"""Checkpoints by layer name: the number of stages, of data-parallel ranks and the ZeRO stage may change."""

from __future__ import annotations

import warnings

import pytest
import torch

import ds_engine
import ds_zero
from ds_engine.checkpoint import CheckpointError
from engine.jobs import on_ranks
from engine.pipeline.test_training import COUNT, config
from harness import ranks
from pipe.model.test_pipeline import items, module

ADAM = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True, "foreach": True}}


def started(num_stages: int, stage: int, schedule: str = "1f1b"):
    built = module(num_stages, True, schedule=schedule)
    settings = config(
        stage, optimizer=ADAM, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 20}}
    )
    return ds_engine.initialize(built, settings)[0]


def trained(engine, first: int, last: int):
    """All data-parallel ranks read the same, so that their number changes nothing."""
    return [engine.train_batch(items(step, 0, COUNT)).item() for step in range(first, last)]


def saved(folder: str) -> None:
    engine = started(4, 1)
    trained(engine, 0, 3)
    engine.save_checkpoint(folder, client_state={"epoch": 7})
    torch.save(trained(engine, 3, 6), f"{folder}/losses.pt")
    engine.destroy()


def resumed(folder: str, num_stages: int, stage: int, schedule: str, exact: bool) -> None:
    engine = started(num_stages, stage, schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, client = engine.load_checkpoint(folder)
    assert client == {"epoch": 7} and engine.global_steps == 3 and engine.micro_steps == 3 * COUNT
    losses, expected = trained(engine, 3, 6), torch.load(f"{folder}/losses.pt")
    assert losses == (expected if exact else pytest.approx(expected, rel=1e-5))
    engine.destroy()


def test_four_stages_go_on_as_others(request, tmp_path):
    """4 stages -> 4, 2, 1, and 2 x 2 and 1 x 4 with ZeRO 3; the same sums give the same bits."""
    folder = str(tmp_path)
    on_ranks(request, 4, saved, groups_may_stay=True, folder=folder)
    for world, stages, stage, schedule, exact in (
        (4, 4, 2, "1f1b", True),
        (2, 2, 1, "1f1b", True),
        (2, 2, 3, "1f1b", True),
        (
            1,
            1,
            0,
            "1f1b",
            False,
        ),  # the gradients of the two uses of the tied weight are added in another order
        (4, 2, 3, "zb-v", False),
        (4, 1, 3, "1f1b", False),
    ):
        on_ranks(
            request,
            world,
            resumed,
            groups_may_stay=True,
            folder=folder,
            num_stages=stages,
            stage=stage,
            schedule=schedule,
            exact=exact,
        )


@ranks(2, groups_may_stay=True)
def test_weights_alone_and_another_model(tmp_path):
    engine = started(2, 2)
    trained(engine, 0, 1)
    engine.save_checkpoint(tmp_path)
    with ds_zero.gathered(list(engine.module.parameters())):
        before = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    engine.destroy()
    other = started(2, 3)
    other.load_checkpoint(tmp_path, load_module_only=True)
    with ds_zero.gathered(list(other.module.parameters())):
        assert all(torch.equal(p, before[n]) for n, p in other.module.named_parameters())
    assert other.global_steps == 0
    other.destroy()
    # A model of other layers is refused on all ranks, before anything is changed.
    built = module(2)
    third, *_ = ds_engine.initialize(built, config(1, optimizer=ADAM))
    with pytest.raises(CheckpointError, match="written for another model"):
        third.load_checkpoint(tmp_path)
    third.destroy()
