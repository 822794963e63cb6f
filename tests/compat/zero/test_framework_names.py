"""Names that trainers touch on a stage-3 engine, in the way in which they do."""

from __future__ import annotations

import copy
import importlib
import itertools
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
from torch import nn

import deepspeed
from compat.zero.test_construction import CONFIG, net
from harness import ranks


@ranks(2)
def test_hooks_are_removed_and_registered_around_generation() -> None:
    engine, *_ = deepspeed.initialize(model=net(), config=CONFIG)
    hooks = engine.optimizer.parameter_offload
    with deepspeed.zero.GatheredParameters(list(engine.parameters())):
        for _, param in itertools.chain(
            hooks.module.named_parameters(), hooks.module.ds_external_parameters()
        ):
            param.ds_active_sub_modules.clear()
        for hook in hooks.forward_hooks + hooks.backward_hooks:
            hook.remove()
        hooks.forward_hooks = []
        assert engine.module.eval()(torch.ones(2, 6)).isfinite().all()
        if not hooks.param_coordinator.is_invalid_trace():
            hooks.param_coordinator._invalidate_trace()
        hooks._register_deepspeed_module(hooks.module)
    engine.train()
    engine.backward(engine(torch.randn(2, 6)).sum())
    engine.step()
    engine.destroy()


def train_once(engine: Any) -> None:
    engine.backward(engine(torch.randn(2, 6)).sum())
    engine.step()


@ranks(2)
def test_states_are_moved_through_the_optimizer() -> None:
    engine, optimizer, *_ = deepspeed.initialize(model=net(), config=CONFIG)
    optimizer.offload_states(include=[OffloadStateTypeEnum.optim_states], device=OffloadDeviceEnum.cpu)
    with pytest.raises((ValueError, RuntimeError), match="reload_states"):
        train_once(engine)
    optimizer.reload_states(non_blocking=True)
    train_once(engine)
    engine.destroy()


@ranks(2)
def test_a_layer_of_divided_parameters_is_copied_whole() -> None:
    ordinary = net()
    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        model = net()
    copied = copy.deepcopy(model[0])
    assert torch.equal(copied.weight, ordinary[0].weight) and type(copied.weight) is nn.Parameter
    assert not hasattr(copied.weight, "ds_id") and model[0].weight.isnan().all()


@ranks(2)
def test_initialize_inside_init() -> None:
    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        with deepspeed.zero.Init(config_dict_or_path=CONFIG):
            model = net()
        assert float(torch.arange(8.0).sum()) == 28.0
        engine, *_ = deepspeed.initialize(model=model, config=CONFIG)
        other = nn.Linear(2, 2)
    assert hasattr(other.weight, "ds_id")
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        assert torch.equal(model[0].weight, net()[0].weight)
    engine.destroy()


@ranks(2)
def test_parameters_that_no_group_holds_are_left_alone_at_stage_0() -> None:
    model = net()
    before = model[0].weight.detach().clone()
    config = {**CONFIG, "zero_optimization": {"stage": 0}}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model[2].parameters(), config=config)
    head = model[2].weight.detach().clone()
    engine.backward(engine(torch.randn(4, 6)).square().mean())
    engine.step()
    assert torch.equal(model[0].weight, before) and not torch.equal(model[2].weight, head)
    engine.destroy()


class Delegating(nn.Module):
    """Hands unknown attributes on to the module inside, as wrappers of adapters do."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("wrapped"), name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.wrapped(x)
        return hidden


@ranks(2)
def test_modules_that_hand_attributes_on_train_as_others_do() -> None:
    losses = []
    for wrap in (lambda module: module, Delegating):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), wrap(nn.Linear(6, 6)), nn.Linear(6, 4))
        engine, *_ = deepspeed.initialize(model=model, config=CONFIG)
        for step in range(3):
            torch.manual_seed(step)
            loss = engine(torch.randn(2, 6)).square().mean()
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        assert all(p.isnan().all() for p in model.parameters())
        engine.destroy()
    assert losses[:3] == losses[3:]


def test_a_name_that_is_a_function_and_a_module_stays_the_function() -> None:
    importlib.import_module("deepspeed.utils.z3_leaf_module")
    assert callable(deepspeed.utils.z3_leaf_module)
    assert importlib.import_module("deepspeed.utils.z3_leaf_module").set_z3_leaf_module
