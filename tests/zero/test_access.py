"""Whole values for reading and writing."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_zero
from harness import ranks
from zero.models import Tiny, batch

STAGES = [0, 1, 2, 3]


def sharded(
    stage: int, dtype: torch.dtype | None = None, **options: bool
) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Tiny(**options)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return ds_zero.shard(model, optimizer, stage, config=ds_zero.ZeroConfig(param_dtype=dtype))


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_gathered_shows_whole_values(stage: int) -> None:
    torch.manual_seed(0)
    expected = Tiny()
    model, _ = sharded(stage)
    with ds_zero.gathered(model.parameters()):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    if stage == 3:
        assert model.get_parameter("head.weight").isnan().all()


@ranks(2)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("stage", STAGES)
def test_rank_0_writes_and_training_goes_on_from_there(stage: int, dtype: torch.dtype | None) -> None:
    model, optimizer = sharded(stage, dtype)
    weight = model.get_parameter("head.weight")
    with ds_zero.gathered(weight, write=True), torch.no_grad():
        weight.fill_(0.25 + dist.get_rank())
    found = ds_zero.full_state_dict(model)
    if dist.get_rank() == 0:
        assert found["head.weight"].unique().tolist() == [0.25]
    with ds_zero.gathered(weight):
        assert weight.unique().tolist() == [0.25]
    model(*batch(0, dist.get_rank())).backward()
    optimizer.step()
    found = ds_zero.full_state_dict(model)
    if dist.get_rank() == 0:
        assert 0 < (found["head.weight"] - 0.25).abs().max() < 0.02


@ranks(2)
def test_writing_some_values_keeps_the_precision_of_the_others() -> None:
    model, _ = sharded(3, torch.bfloat16)
    before = ds_zero.full_state_dict(model)
    weight = model.get_parameter("head.weight")
    with ds_zero.gathered(weight, write=True), torch.no_grad():
        weight[0].zero_()
    after = ds_zero.full_state_dict(model)
    if dist.get_rank() == 0:
        assert torch.equal(after["head.weight"][1:], before["head.weight"][1:])
        assert not after["head.weight"][0].any()


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_a_write_without_write_raises(stage: int) -> None:
    model, _ = sharded(stage)
    weight = model.get_parameter("head.weight")
    with pytest.raises(ValueError, match=r"\['head\.weight'\] were written.*write=True"):
        with ds_zero.gathered(weight), torch.no_grad():
            weight.add_(1)


@ranks(2)
def test_gathering_nests() -> None:
    model, _ = sharded(3)
    weight = model.get_parameter("head.weight")
    with ds_zero.gathered(weight):
        with ds_zero.gathered(model.parameters()):
            assert not weight.isnan().any()
        assert not weight.isnan().any()
    assert weight.isnan().all()


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_full_state_dict_loads_into_a_plain_model(stage: int) -> None:
    model, _ = sharded(stage, tied=True, extras=True)
    found = ds_zero.full_state_dict(model)
    if dist.get_rank() == 0:
        plain = Tiny(tied=True, extras=True)
        assert list(found) == list(plain.state_dict())
        plain.load_state_dict(found)
        assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()
    else:
        assert found == {}


def test_an_unsharded_module_is_named() -> None:
    with pytest.raises(ValueError, match=r"this Tiny is not sharded: call ds_zero\.shard"):
        ds_zero.full_state_dict(Tiny())
    with (
        pytest.raises(ValueError, match="this Parameter is not sharded"),
        ds_zero.gathered(nn.Parameter(torch.ones(2))),
    ):
        pass


def test_a_single_process_needs_no_process_group() -> None:
    for stage in STAGES:
        model, optimizer = sharded(stage)
        model(*batch(0, 0)).backward()
        ds_zero.clip_grad_norm_(model, 1.0)
        optimizer.step()
        assert set(ds_zero.full_state_dict(model)) == set(model.state_dict(keep_vars=True))
