"""Habits of plain loops: each trains right, or raises with the remedy on every rank."""

from __future__ import annotations

import copy
import dataclasses
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_zero
from harness import ranks

STAGES = [0, 1, 2, 3]
ALL_SHARDED = ds_zero.ZeroConfig(persistence_threshold_numel=0)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 3))


def data(step: int) -> Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(step))


def two_groups(model: nn.Module) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    return torch.optim.AdamW(
        [
            {"params": decayed},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model(data(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def equal(model: nn.Module, plain: nn.Module) -> bool:
    values = ds_zero.full_state_dict(model)
    return all(torch.equal(v, plain.state_dict()[n]) for n, v in values.items())


# --- the optimizer after the model


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_fsdp2s_order_trains_as_plain_pytorch(stage: int) -> None:
    model, plain = net(), net()
    assert ds_zero.shard(model, stage=stage, config=ALL_SHARDED) is model
    optimizer, plain_optimizer = two_groups(model), two_groups(plain)
    assert ds_zero.shard_optimizer(model, optimizer) is optimizer
    train(model, optimizer, range(3))
    train(plain, plain_optimizer, range(3))
    assert equal(model, plain)


@pytest.mark.parametrize("stage", STAGES)
def test_without_shard_optimizer_the_first_step_raises(stage: int) -> None:
    model = ds_zero.shard(net(), stage=stage, config=ALL_SHARDED)
    optimizer = two_groups(model)
    model(data(0)).square().mean().backward()
    with pytest.raises(ValueError, match=r"ds_zero\.shard_optimizer"):
        optimizer.step()


def test_what_shard_optimizer_refuses() -> None:
    model = ds_zero.shard(net(), stage=2)
    with pytest.raises(ValueError, match=r"leaves out 2 parameters.*'2\.weight'.*requires_grad_\(False\)"):
        ds_zero.shard_optimizer(model, torch.optim.SGD(model[0].parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r'layout="whole"'):
        ds_zero.shard_optimizer(model, torch.optim.Adafactor(model.parameters()))
    optimizer = ds_zero.shard_optimizer(model, two_groups(model))
    with pytest.raises(ValueError, match="has an optimizer already"):
        ds_zero.shard_optimizer(model, two_groups(net()))
    whole = ds_zero.shard(net(), stage=2, config=ds_zero.ZeroConfig(layout="whole"))
    kept = ds_zero.shard_optimizer(whole, torch.optim.Adafactor(whole.parameters()))
    train(whole, kept, range(1))
    assert optimizer.param_groups


# --- one rank's optimizer state on another rank


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_rank_0s_optimizer_state_is_refused_on_every_rank(stage: int) -> None:
    model = nn.Linear(16, 256, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ds_zero.shard(model, optimizer, stage, config=ALL_SHARDED)
    train(model, optimizer, range(2))
    box: list[Any] = [copy.deepcopy(optimizer.state_dict())]
    dist.broadcast_object_list(box)
    if stage == 0:
        optimizer.load_state_dict(box[0])  # every rank has all of it
        return
    with pytest.raises(ValueError, match=r"ds_checkpoint\.save") as caught:
        optimizer.load_state_dict(box[0])
    assert ("rank 0 of 2, but this is rank 1" if dist.get_rank() else "does not fit on rank 1") in str(
        caught.value
    )


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_a_ranks_own_and_a_plain_optimizers_states_are_loaded(stage: int) -> None:
    plain, model = net(), net()
    plain_optimizer, optimizer = two_groups(plain), two_groups(model)
    train(plain, plain_optimizer, range(2))
    model.load_state_dict(plain.state_dict())
    ds_zero.shard(model, optimizer, stage, config=ALL_SHARDED)
    optimizer.load_state_dict(copy.deepcopy(plain_optimizer.state_dict()))
    train(plain, plain_optimizer, range(2, 4))
    train(model, optimizer, range(2, 4))
    assert equal(model, plain)
    own = copy.deepcopy(optimizer.state_dict())
    for state in optimizer.state.values():
        state["exp_avg"].zero_()
    optimizer.load_state_dict(own)
    train(plain, plain_optimizer, range(4, 6))
    train(model, optimizer, range(4, 6))
    assert equal(model, plain)


def test_a_state_of_another_model_is_refused_by_name() -> None:
    model = net()
    optimizer = ds_zero.shard(model, two_groups(model), 2)[1]
    other = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 3))
    other_optimizer = two_groups(other)
    train(other, other_optimizer, range(1))
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter '0\.weight' has 512 elements.*1024"):
        optimizer.load_state_dict(other_optimizer.state_dict())


# --- ranks that were given different things


def differing(what: str, rank: int) -> dict[str, Any]:
    stage = 2 + (rank if what == "stage" else 0)
    config = ALL_SHARDED
    model = net()
    lr = 1e-3 * (1 + (rank if what == "rate" else 0))
    betas = (0.9, 0.99 + 0.001 * (rank if what == "betas" else 0))
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=betas)
    if what == "optimizer" and rank:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    if what == "config" and rank:
        config = dataclasses.replace(config, reduce_op="sum")
    if what == "frozen" and rank:
        model[0].weight.requires_grad_(False)
    return {"model": model, "optimizer": optimizer, "stage": stage, "config": config}


NAMED = {
    "stage": "stage is 2 on rank 0 and 3 on rank 1",
    "rate": r"param_groups\[0\]\['lr'\] is 0\.001 on rank 0 and 0\.002 on rank 1",
    "betas": r"param_groups\[0\]\['betas'\] is \(0\.9, 0\.99\) on rank 0",
    "optimizer": "the optimizer is AdamW on rank 0 and SGD on rank 1",
    "config": r"ZeroConfig\.reduce_op is 'mean' on rank 0 and 'sum' on rank 1",
    "frozen": "the model's parameters is 4 with checksum",
}


@ranks(2)
@pytest.mark.parametrize("what", NAMED)
def test_ranks_with_different_arguments_raise_everywhere(what: str) -> None:
    with pytest.raises(ValueError, match=NAMED[what]):
        ds_zero.shard(**differing(what, dist.get_rank()))


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_a_rate_that_parts_later_is_found_at_the_next_step(stage: int) -> None:
    model = net()
    optimizer = ds_zero.shard(model, two_groups(model), stage)[1]
    train(model, optimizer, range(1))
    if dist.get_rank() == 1:
        optimizer.param_groups[1]["lr"] *= 0.5  # as ReduceLROnPlateau does with a loss of one rank
    model(data(1)).square().mean().backward()
    with pytest.raises(
        ValueError, match=r"param_groups\[1\]\['lr'\] is 0\.01 on rank 0 and 0\.005 on rank 1"
    ):
        optimizer.step()


# --- state_dict of a sharded model


@ranks(2)
def test_a_state_dict_is_full_of_values_or_raises() -> None:
    model = net()
    kept = ds_zero.shard(model, two_groups(model), 3, config=ALL_SHARDED)
    for module in (model, model[0]):
        with pytest.raises(ValueError, match=r"ds_zero\.full_state_dict.*ds_zero\.gathered"):
            module.state_dict()
    assert model[1].state_dict() == {}
    with ds_zero.gathered(model[0]):
        values = model.state_dict()
        assert torch.equal(values["0.weight"], net()[0].weight)
        torch.save({k: v for k, v in values.items() if k.startswith("0.")}, io.BytesIO())
        with pytest.raises(ValueError, match=r"'2\.weight'.*ds_zero\.gathered"):
            torch.save(values, io.BytesIO())
        with pytest.raises(ValueError, match=r"'2\.bias'"):
            values["2.bias"].clone()
    with ds_zero.gathered(model):
        assert all(torch.equal(v, net().state_dict()[k]) for k, v in model.state_dict().items())
    assert kept


def test_frameworks_that_only_ask_get_tensors_that_raise_when_read() -> None:
    model = net()
    kept = ds_zero.shard(model, two_groups(model), 3, config=ALL_SHARDED)
    ds_zero.set_presentation(model, refuse_state_dict=False)
    values = model.state_dict()
    assert {k: v.shape for k, v in values.items()} == {k: v.shape for k, v in net().state_dict().items()}
    with pytest.raises(ValueError, match=r"'0\.weight'.*ds_zero\.full_state_dict"):
        values["0.weight"].norm()
    assert kept
