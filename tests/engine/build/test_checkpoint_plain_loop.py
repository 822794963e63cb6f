"""Checkpoints go from a plain loop (`ds_checkpoint.save`) into an engine, and back."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_checkpoint
import ds_engine
import ds_zero
from ds_checkpoint import CheckpointError
from engine import jobs
from harness import ranks


def plain(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = jobs.net(seed)
    params = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(params, lr=0.02, weight_decay=0.1, foreach=True)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    tokens = torch.randint(0, 11, (8,), generator=torch.Generator().manual_seed(number))
    nn.functional.cross_entropy(model(tokens), tokens).backward()
    optimizer.step()
    optimizer.zero_grad()


def engine(stage: int) -> ds_engine.Engine:
    config = {key: value for key, value in jobs.config(stage).items() if key != "scheduler"}
    made, *_ = ds_engine.initialize(model=jobs.net(9), config=config)
    made.progress.write = lambda line: None
    return made


def values(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and first moments of a sharded model, whole."""
    held = {name: ds_zero.get_full(model, name, "param").clone() for name, _ in model.named_parameters()}
    for name, param in model.named_parameters():
        if param.requires_grad:
            held[f"{name}/exp_avg"] = ds_zero.get_full(model, name, "exp_avg").clone()
    return held


@ranks(2)
@pytest.mark.parametrize("stage", [0, 3])
def test_an_engine_loads_what_a_plain_loop_has_saved_and_the_other_way_round(
    stage: int, tmp_path: Path
) -> None:
    model, optimizer = plain()
    ds_zero.shard(model, optimizer, 2)
    for number in range(2):
        step(model, optimizer, number)
    ds_checkpoint.save(tmp_path / "plain", model, optimizer, {"epoch": 4})
    with engine(stage) as made:
        jobs.train(made, 1)
        told = pytest.warns(UserWarning, match="without an engine .* counted from 0")
        with told if dist.get_rank() == 0 else contextlib.nullcontext():
            _, client_state = made.load_checkpoint(tmp_path / "plain")
        assert client_state == {"epoch": 4} and (made.global_steps, made.global_samples) == (0, 0)
        assert made.optimizer.param_groups[0]["lr"] == 0.02
        expected, found = values(model), values(made.module)
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
        jobs.train(made, 2)
        made.save_checkpoint(tmp_path / "engine", client_state={"epoch": 5})
        expected = values(made.module)

    # Into a sharded loop, and into one that is not.
    other, other_optimizer = plain(seed=3)
    ds_zero.shard(other, other_optimizer, 1)
    assert ds_checkpoint.load(tmp_path / "engine", other, other_optimizer) == {"epoch": 5}
    found = values(other)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    step(other, other_optimizer, 5)
    whole, whole_optimizer = plain(seed=4)
    ds_checkpoint.load(tmp_path / "engine", whole, whole_optimizer)
    for name, param in whole.named_parameters():
        assert torch.equal(param, expected[name]), name
        if param.requires_grad:
            assert torch.equal(whole_optimizer.state[param]["exp_avg"], expected[f"{name}/exp_avg"]), name
            assert float(whole_optimizer.state[param]["step"]) == 4
    step(whole, whole_optimizer, 5)


@ranks(1)
def test_a_model_that_was_saved_alone(tmp_path: Path) -> None:
    model, _ = plain()
    ds_checkpoint.save(tmp_path, model)
    with engine(2) as made:
        with pytest.raises(
            CheckpointError, match="saved without an optimizer: pass load_optimizer_states=False"
        ):
            made.load_checkpoint(tmp_path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made.load_checkpoint(tmp_path, load_optimizer_states=False)
        assert len([w for w in caught if "counted from 0" in str(w.message)]) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing is said of counters where none are asked for
            made.load_checkpoint(tmp_path, load_module_only=True)
        for name, param in model.named_parameters():
            assert torch.equal(ds_zero.get_full(made.module, name, "param"), param), name
        jobs.train(made, 1)
