"""Whole values for reading and writing."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_zero
from ds_zero.tensors.fingerprint import fingerprint
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
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("stage", STAGES)
def test_a_write_that_would_be_lost_raises_on_every_rank(stage: int, dtype: torch.dtype | None) -> None:
    model, _ = sharded(stage, dtype)
    weight, bias = model.get_parameter("head.weight"), model.get_parameter("blocks.0.up.bias")
    change = dist.get_rank()  # 0 changes nothing
    with pytest.raises(ValueError, match=r"\['blocks\.0\.up\.bias'\] were written.*write=True"):
        with ds_zero.gathered(bias):
            bias.data.add_(change)  # `.data` has no version counter
    with pytest.raises(ValueError, match=r"\['head\.weight'\] were written by ranks \[1\] but not by rank 0"):
        with ds_zero.gathered(weight, write=True):
            weight.data[3, 4] += change
    with pytest.raises(ValueError, match=r"writer_rank=2: .* ranks 0 to 1"):
        with ds_zero.gathered(weight, write=True, writer_rank=2):
            pass


@ranks(3)
@pytest.mark.parametrize("stage", STAGES)
def test_any_rank_writes_and_any_way_of_writing_counts(stage: int) -> None:
    model, _ = sharded(stage)
    weight = model.get_parameter("head.weight")
    swapped = weight.shape
    with ds_zero.gathered(model.head, write=True, writer_rank=2):
        if dist.get_rank() == 2:
            weight.data = torch.full(swapped, 0.5)  # replaces the storage that was gathered
    found = ds_zero.get_full(model, "head.weight")
    assert found is not None and found.unique().tolist() == [0.5]
    with ds_zero.gathered(model.head):
        assert weight.detach().unique().tolist() == [0.5]
    with pytest.raises(ValueError, match=r"was given data of shape \(2,\)"):
        with ds_zero.gathered(weight, write=True):
            weight.data = torch.zeros(2)


@ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_nested_gathers_lose_nothing(stage: int) -> None:
    model, _ = sharded(stage)
    weight, bias = model.get_parameter("head.weight"), model.get_parameter("blocks.0.up.bias")
    with ds_zero.gathered(model):  # reads
        with ds_zero.gathered(weight, write=True):
            weight.data.fill_(0.5)
        assert weight.unique().tolist() == [0.5]
    with ds_zero.gathered(model, write=True):
        with ds_zero.gathered(bias):  # reads, inside of one that writes
            bias.data.fill_(0.25)
        with ds_zero.gathered(weight, write=True):
            weight.data.fill_(0.75)
        with ds_zero.gathered(weight):
            assert weight.unique().tolist() == [0.75]
    for name, value in (("head.weight", 0.75), ("blocks.0.up.bias", 0.25)):
        found = ds_zero.get_full(model, name)
        assert found is not None and found.unique().tolist() == [value]


@ranks(2)
def test_one_context_gathers_parameters_of_several_models() -> None:
    (first, _), (second, _) = sharded(3), sharded(1, torch.bfloat16)
    third, _ = sharded(3, torch.bfloat16)
    weights = [m.get_parameter("head.weight") for m in (first, second, third)]
    with ds_zero.gathered(weights, write=True):
        for number, weight in enumerate(weights):
            weight.data.fill_(number + dist.get_rank())
    for number, model in enumerate((first, second, third)):
        found = ds_zero.get_full(model, "head.weight")
        assert found is not None and found.unique().tolist() == [number]
    assert weights[0].isnan().all()
    assert weights[2].isnan().all()


@ranks(2)
def test_an_exception_inside_adopts_nothing_and_gives_everything_back() -> None:
    model, _ = sharded(3)
    before = ds_zero.get_full(model, "head.weight")
    weight = model.get_parameter("head.weight")
    with pytest.raises(RuntimeError, match="shape"), ds_zero.gathered(weight, write=True):
        weight.data.zero_().view(1)
    assert weight.isnan().all()
    after = ds_zero.get_full(model, "head.weight")
    assert before is not None and after is not None and torch.equal(before, after)


@ranks(2)
def test_a_step_inside_is_named() -> None:
    model, optimizer = sharded(3)
    model(*batch(0, dist.get_rank())).backward()
    with pytest.raises(ValueError, match=r"optimizer\.step\(\).*leave the context first"):
        with ds_zero.gathered(model):
            optimizer.step()
    optimizer.zero_grad()
    model(*batch(0, dist.get_rank())).backward()


@ranks(2)
def test_a_model_runs_inside_and_stays_gathered() -> None:
    model, optimizer = sharded(3)
    plain_loss = model(*batch(0, dist.get_rank())).item()
    with ds_zero.gathered(model):
        loss = model(*batch(0, dist.get_rank()))
        loss.backward()
        assert not model.get_parameter("head.weight").isnan().any()
    assert loss.item() == plain_loss
    optimizer.step()


def test_a_fingerprint_sees_every_bit_and_place() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(700_000, generator=generator)
    before = fingerprint(values)
    assert fingerprint(values.clone()) == before
    for place in (0, 5, 262_143, 262_144, 699_999):
        changed = values.clone()
        changed.view(torch.int32)[place] ^= 1
        assert fingerprint(changed) != before
    swapped = values.clone()
    swapped[[3, 400_000]] = values[[400_000, 3]]
    assert fingerprint(swapped) != before
    assert fingerprint(values.flip(0)) != before
    assert fingerprint(torch.zeros(4)) != fingerprint(-torch.zeros(4))
    for dtype in (torch.bfloat16, torch.int64, torch.uint8, torch.bool):
        assert fingerprint(torch.ones(7).to(dtype)) != fingerprint(torch.zeros(7).to(dtype))


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
