"""`deepspeed.zero`: construction without memory, whole parameters, and what code asks of parameters."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

import deepspeed
from harness import ranks

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "startup_summary": False,
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 40), nn.BatchNorm1d(40), nn.Linear(40, 3))


@ranks(2)
def test_init_then_initialize_equals_ordinary_construction() -> None:
    ordinary = net()
    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        model = net()
    weight = model[0].weight
    assert weight.device.type == "cpu" and weight.ds_status is ZeroParamStatus.NOT_AVAILABLE
    assert weight.ds_numel == 240 and tuple(weight.ds_shape) == (40, 6)
    assert len({p.ds_id for p in model.parameters()}) == 6
    assert torch.equal(model[1].running_var, ordinary[1].running_var)
    with deepspeed.zero.GatheredParameters(weight):
        assert weight.ds_status is ZeroParamStatus.AVAILABLE
        assert torch.equal(weight, ordinary[0].weight)
    assert not hasattr(ordinary[0].weight, "ds_id")
    engine, *_ = deepspeed.initialize(model=model, config=CONFIG)
    assert engine.module[0].weight is weight and weight.ds_status is ZeroParamStatus.NOT_AVAILABLE
    assert weight.ds_tensor.ndim == 1 and 0 < weight.ds_tensor.numel() < 240
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        assert torch.equal(weight, ordinary[0].weight)
    engine.destroy()
    assert not hasattr(weight, "ds_id") and torch.equal(weight, ordinary[0].weight)


@ranks(2)
@pytest.mark.parametrize("writer", [0, 1])
def test_what_one_rank_writes_before_initialize_stays_on_all(writer: int) -> None:
    with deepspeed.zero.Init():
        model = net()
    model[0].weight._note = "mine"
    # A set, whose order differs between ranks, as Transformers passes it.
    with deepspeed.zero.GatheredParameters(set(model.parameters()), modifier_rank=writer):
        if dist.get_rank() == writer:
            with torch.no_grad():
                for number, param in enumerate(model.parameters()):
                    param.fill_(number + 1.0)
    assert model[0].weight._note == "mine"
    engine, *_ = deepspeed.initialize(model=model, config=CONFIG)
    for number, param in enumerate(model.parameters()):
        with deepspeed.zero.GatheredParameters(param):
            assert torch.equal(param, torch.full_like(param, number + 1.0))
    engine.destroy()


@ranks(2)
@pytest.mark.parametrize("writer", [0, 1])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_what_one_rank_writes_after_initialize_stays_on_all(stage: int, writer: int) -> None:
    model = net()
    engine, *_ = deepspeed.initialize(model=model, config={**CONFIG, "zero_optimization": {"stage": stage}})
    with deepspeed.zero.GatheredParameters(set(model.parameters()), modifier_rank=writer):
        if dist.get_rank() == writer:
            with torch.no_grad():
                model[0].weight.fill_(3.0)
    with deepspeed.zero.GatheredParameters(model[0].weight):
        assert torch.equal(model[0].weight, torch.full((40, 6), 3.0))
    engine.destroy()


@ranks(2)
def test_a_write_that_would_be_lost_raises() -> None:
    with deepspeed.zero.Init():
        model = net()
    with pytest.raises(ValueError, match="would be lost"):
        with deepspeed.zero.GatheredParameters(model[0].weight), torch.no_grad():
            model[0].weight.zero_()
    engine, *_ = deepspeed.initialize(model=model, config=CONFIG)
    with pytest.raises(ValueError, match="would be lost"):
        with deepspeed.zero.GatheredParameters(model[0].weight), torch.no_grad():
            model[0].weight.zero_()
    engine.destroy()


@ranks(2)
def test_all_gather_and_partition_of_a_parameter() -> None:
    engine, *_ = deepspeed.initialize(model=net(), config=CONFIG)
    weight = engine.module[2].weight
    weight.all_gather()
    assert weight.ds_status is ZeroParamStatus.AVAILABLE and torch.isfinite(weight).all()
    weight.partition()
    assert weight.ds_status is ZeroParamStatus.NOT_AVAILABLE
    engine.destroy()


def test_contexts_leave_ordinary_parameters_alone() -> None:
    layer = nn.Linear(2, 2)
    with deepspeed.zero.GatheredParameters(layer.parameters(), modifier_rank=0), torch.no_grad():
        layer.weight.fill_(2.0)
    assert layer.weight.sum() == 8
    with deepspeed.zero.Init(config_dict_or_path={"zero_optimization": {"stage": 2}}):
        assert not nn.Linear(2, 2).weight.is_meta
    with deepspeed.zero.Init(enabled=False):
        assert not nn.Linear(2, 2).weight.is_meta


@pytest.mark.parametrize(
    ("mark", "wanted", "found"),
    [
        (deepspeed.utils.set_z3_leaf_modules, [nn.Linear], 2),
        (deepspeed.utils.set_z3_leaf_modules, ["torch.nn.modules.linear.Linear"], 2),
        (lambda m, w: deepspeed.utils.set_z3_leaf_modules_by_name(m, w)[0], ["0"], 1),
        (lambda m, w: deepspeed.utils.set_z3_leaf_modules_by_suffix(m, w)[0], ["2"], 1),
    ],
)
def test_leaf_modules_are_marked(mark, wanted, found) -> None:
    model = net()
    assert len(mark(model, wanted)) == found == len(deepspeed.utils.get_z3_leaf_modules(model))
    with pytest.raises(ValueError, match="No modules"):
        mark(model, ["absent"])
    assert deepspeed.utils.unset_z3_leaf_modules(model, [nn.Linear])
    assert not deepspeed.utils.get_z3_leaf_modules(model)


def test_estimates_grow_with_the_model_and_shrink_with_ranks(capsys) -> None:
    from deepspeed.runtime.zero.stage3 import (
        estimate_zero3_model_states_mem_needs,
        estimate_zero3_model_states_mem_needs_all_live,
    )

    one = estimate_zero3_model_states_mem_needs(int(1e9), int(1e8), 1, 1, False, False)
    eight = estimate_zero3_model_states_mem_needs(int(1e9), int(1e8), 8, 1, False, False)
    assert one[1] - one[2] == 18 * int(1e9) == 8 * (eight[1] - eight[2])
    estimate_zero3_model_states_mem_needs_all_live(net())
    assert "offload_param=cpu" in capsys.readouterr().out


def test_tiled_linear_is_the_linear_layer() -> None:
    ordinary = nn.Linear(6, 4)
    tiled = deepspeed.zero.TiledLinear(6, 4, in_splits=2, out_splits=2, init_linear=ordinary)
    x = torch.randn(3, 6)
    assert torch.equal(tiled(x), ordinary(x))
    with pytest.raises(RuntimeError, match="out splits"):
        deepspeed.zero.TiledLinear(6, 4, out_splits=5)
