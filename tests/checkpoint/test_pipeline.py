"""`save` and `load` of a pipeline in a plain loop: by the names of its layers, whatever the number of stages."""

from __future__ import annotations

import warnings

import pytest
import torch

import ds_checkpoint
from ds_checkpoint.errors import CheckpointError
from ds_pipe.model import Pipeline
from engine.jobs import on_ranks
from harness import ranks
from pipe.model.test_pipeline import items, module

COUNT = 4


def started(num_stages: int, schedule: str = "1f1b"):
    built = module(num_stages, True, schedule=schedule)
    # Two groups, of which the ranks have different parts.
    decayed = [p for p in built.parameters() if p.ndim > 1]
    others = [p for p in built.parameters() if p.ndim <= 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return built, Pipeline(built, COUNT), torch.optim.AdamW(groups, lr=1e-2)


def trained(pipeline, optimizer, first: int, last: int):
    losses = []
    for step in range(first, last):
        losses.append(pipeline.forward_backward(items(step, 0, COUNT)).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def saved(folder: str) -> None:
    built, pipeline, optimizer = started(4)
    trained(pipeline, optimizer, 0, 3)
    optimizer.param_groups[1]["lr"] = 0.02
    ds_checkpoint.save(folder, built, optimizer, {"epoch": 7})
    torch.save(trained(pipeline, optimizer, 3, 6), f"{folder}/losses.pt")
    pipeline.close()


def resumed(folder: str, num_stages: int, schedule: str, exact: bool) -> None:
    built, pipeline, optimizer = started(num_stages, schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random generators belong to ranks
        assert ds_checkpoint.load(folder, built, optimizer) == {"epoch": 7}
    assert optimizer.param_groups[1]["lr"] == 0.02
    losses, expected = trained(pipeline, optimizer, 3, 6), torch.load(f"{folder}/losses.pt")
    assert losses == (expected if exact else pytest.approx(expected, rel=1e-5))
    pipeline.close()


def test_four_stages_go_on_as_others(request, tmp_path):
    folder = str(tmp_path)
    on_ranks(request, 4, saved, folder=folder)
    # On one rank, the gradients of the two uses of the tied weight are added in another order.
    for world, stages, schedule, exact in (
        (4, 4, "1f1b", True),
        (2, 2, "1f1b", True),
        (4, 2, "zb-v", False),
        (1, 1, "1f1b", False),
    ):
        on_ranks(request, world, resumed, folder=folder, num_stages=stages, schedule=schedule, exact=exact)


@ranks(2)
def test_another_model_is_refused(tmp_path):
    built, pipeline, optimizer = started(2)
    ds_checkpoint.save(tmp_path, built, optimizer)
    pipeline.close()
    other = module(2)
    with pytest.raises(CheckpointError, match="the checkpoint has groups of"):
        ds_checkpoint.load(tmp_path, other, torch.optim.AdamW(other.parameters()))
    with pytest.raises(CheckpointError, match="tensors that the model lacks"):
        ds_checkpoint.load(tmp_path, other)
