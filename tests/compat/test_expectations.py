"""What test suites written for DeepSpeed expect beside losses: which exceptions, attributes and types."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.ops.adam import FusedAdam
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.precision_config import DeepSpeedFP16Config
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from pydantic import Field, ValidationError
from torch import nn

import deepspeed
from harness import ranks

BATCH = {"train_micro_batch_size_per_gpu": 1, "startup_summary": False}
ADAM = {"optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}


def start(config: dict[str, Any], model: nn.Module | None = None, **given: Any) -> Any:
    model = nn.Linear(4, 4) if model is None else model
    return deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config={**BATCH, **config}, **given
    )


@ranks(1)
def test_the_optimizer_of_the_configuration_is_of_the_class_with_its_name() -> None:
    _, optimizer, _, _ = start(ADAM)
    assert isinstance(optimizer, FusedAdam)
    assert not isinstance(start({"optimizer": {"type": "Lamb", "params": {"lr": 1e-3}}})[1], FusedAdam)
    assert FusedAdam([nn.Parameter(torch.ones(2))]).defaults["lr"] == 1e-3
    assert deepspeed.ops.__compatible_ops__["fused_adam"] and not deepspeed.ops.__compatible_ops__["gds"]


@ranks(1)
@pytest.mark.parametrize(
    "config",
    [
        {"train_batch_size": 3, "gradient_accumulation_steps": 2},
        {"zero_optimization": {"stage": 7}},
        {"checkpoint": {"tag_validation": "perhaps"}},
    ],
)
def test_a_mistake_is_found_under_each_name_of_the_original(config: dict[str, Any]) -> None:
    for kind in (AssertionError, ValueError, ZeRORuntimeException, deepspeed.DeepSpeedConfigError):
        with pytest.raises(kind):
            start({**ADAM, **config})


@ranks(1)
@pytest.mark.parametrize(("own", "sums"), [("fp32", "bf16"), ("bf16", "fp32"), ("fp16", "bf16")])
def test_sums_of_another_dtype_need_a_stage(own: str, sums: str) -> None:
    config = {**ADAM, "data_types": {"grad_accum_dtype": sums}, own: {"enabled": True}}
    if own == "fp32":
        del config[own]
    with pytest.raises(NotImplementedError, match=f"{sums}.*needs stage 1"):
        start(config)
    start({**config, "zero_optimization": {"stage": 1}})


@ranks(1)
def test_sizes_of_a_configuration_are_filled_in_again() -> None:
    config = DeepSpeedConfig({"train_batch_size": 8})
    config.train_batch_size, config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps = (
        12,
        None,
        3,
    )
    config._configure_train_batch_size()
    assert config.train_micro_batch_size_per_gpu == 4
    config.train_micro_batch_size_per_gpu = 5
    with pytest.raises(AssertionError, match="12 is not"):
        config._configure_train_batch_size()


@ranks(1)
def test_the_schedule_that_is_passed_wins() -> None:
    section = {"scheduler": {"type": "WarmupLR", "params": {}}}
    made = torch.optim.lr_scheduler.StepLR
    schedule = start({**ADAM, **section}, lr_scheduler=lambda o: made(o, 1))[3]
    assert isinstance(schedule, made)
    model = nn.Linear(4, 4)
    elsewhere = made(torch.optim.SGD(model.parameters(), lr=1.0), 1)
    assert start(ADAM, model, lr_scheduler=elsewhere)[3] is elsewhere


@ranks(1)
def test_the_loss_scale_tells_what_it_has_counted() -> None:
    fp16 = {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 8,
        "loss_scale_window": 2,
        "hysteresis": 1,
    }
    engine, optimizer, _, _ = start({**ADAM, "fp16": fp16})
    scales = []
    for value in (float("inf"), 0.1, float("nan"), 0.1, 0.1, 0.1):
        for param in engine.parameters():  # by hand, as suites do, at stage 0
            param.grad = torch.full_like(param, value)
        engine.step()
        scales.append(optimizer.loss_scale_config.cur_scale)
    assert scales == [128, 128, 64, 64, 64, 128]
    assert optimizer.cur_iter == 6 and optimizer.scale_window == 2 and optimizer.dynamic_loss_scale
    assert engine.skipped_steps == 2 and all(p.grad is None for p in engine.parameters())


@ranks(1)
def test_gradients_put_on_parameters_are_those_of_the_step() -> None:
    torch.manual_seed(1)
    plain, model = nn.Linear(4, 4), nn.Linear(4, 4)
    model.load_state_dict(plain.state_dict())
    for param in plain.parameters():
        param.grad = torch.ones_like(param)
    torch.optim.SGD(plain.parameters(), lr=0.5).step()
    engine, *_ = start({"optimizer": {"type": "SGD", "params": {"lr": 0.5}}, "gradient_clipping": 0}, model)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    engine.step()
    assert torch.equal(model.weight, plain.weight)


@ranks(1)
def test_the_optimizer_of_bf16_at_stage_0() -> None:
    optimizer = start({**ADAM, "bf16": {"enabled": True}})[1]
    assert isinstance(optimizer, FP16_UnfusedOptimizer) and optimizer.low_precision_dtype is torch.bfloat16
    assert optimizer.loss_scale_config.cur_scale == 1 and not optimizer.loss_scale_config.dynamic_loss_scale


@ranks(2)
@pytest.mark.parametrize("stage", [1, 3])
def test_masters_are_what_the_optimizer_keeps_states_of(stage: int) -> None:
    engine, optimizer, _, _ = start(
        {**ADAM, "bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    )
    engine.backward(engine(torch.ones(1, 4, dtype=torch.bfloat16)).sum())
    engine.step()
    parts = (
        optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    )
    assert all(
        part.dtype == torch.float32 and "step" in optimizer.optimizer.state[part]
        for part in parts
        if part.numel()
    )
    engine.destroy()


@ranks(2)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_zero_grad_drops_what_has_accumulated(stage: int) -> None:
    engine, *_ = start({**ADAM, "zero_optimization": {"stage": stage}})
    found = []
    for _ in range(2):
        engine.zero_grad()
        engine.backward(engine(torch.ones(1, 4)).sum())
        found.append(deepspeed.utils.safe_get_full_grad(engine.module.weight))
    assert torch.equal(found[0], found[1])
    engine.destroy()


@ranks(2)
def test_small_parameters_of_stage_3_are_known_too() -> None:
    section = {"stage": 3, "stage3_param_persistence_threshold": 10}
    engine, *_ = start({**ADAM, "zero_optimization": section}, nn.Linear(8, 8))
    weight, bias = engine.module.weight, engine.module.bias
    assert (
        bias.ds_persist and bias.ds_status is deepspeed.zero.ZeroParamStatus.AVAILABLE and bias.ds_numel == 8
    )
    assert not weight.ds_persist and hasattr(weight, "ds_id") and not hasattr(bias, "ds_id")
    with deepspeed.zero.GatheredParameters([weight, bias]):
        assert torch.isfinite(weight).all() and torch.isfinite(bias).all()
    with pytest.raises(RuntimeError, match="in-place modification"):
        with deepspeed.zero.GatheredParameters(weight), torch.no_grad():
            weight.add_(1.0)
    engine.destroy()
    assert not hasattr(bias, "ds_numel")


@ranks(1)
def test_the_level_of_the_logger_and_clipping_are_the_configurations() -> None:
    from types import SimpleNamespace

    from deepspeed.utils import logging

    before = logging.logger.level
    try:
        engine = start({**ADAM, "log_level": "ERROR"})[0]
        assert engine.log_level() == "ERROR" and logging.logger.level == 40
    finally:
        logging.logger.setLevel(before)
    assert start(ADAM)[0].log_level() is None and logging.logger.level == before
    seen = SimpleNamespace(_config=SimpleNamespace(gradient_clipping=0.5))
    assert deepspeed.DeepSpeedEngine.gradient_clipping(seen) == 0.5


@ranks(2)
def test_two_backwards_by_hand_through_one_graph() -> None:
    engine, *_ = start({**ADAM, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}})
    out = engine(torch.ones(1, 4))
    found = []
    for again in (True, False):
        engine.zero_grad()
        engine.scale(out.sum(), retain_graph=again).backward(retain_graph=again)
        found.append(deepspeed.utils.safe_get_full_grad(engine.module.weight))
    assert torch.equal(found[0], torch.ones(4, 4)) and torch.equal(found[1], found[0])
    engine.destroy()


def test_the_launcher_called_from_code_raises() -> None:
    from deepspeed.launcher import runner

    for line in ("--num_gpus 1 -i localhost x.py", "--num_nodes 1 -e localhost x.py"):
        with pytest.raises(ValueError, match="include/exclude"):
            runner.main(line.split())
    with pytest.raises(ValueError, match="--num_gpus 0: at least 1 rank is required"):
        runner.main(["--num_gpus", "0", "x.py"])
    with pytest.raises(ValueError, match="--hostfile /nowhere: there is no such file"):
        runner.main(["--hostfile", "/nowhere", "x.py"])


@ranks(2)
def test_frozen_parameters_have_no_master_and_empty_slices_are_slices() -> None:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param, safe_get_local_grad

    model = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 1))
    model[0].requires_grad_(False)
    section = {"stage": 3, "stage3_param_persistence_threshold": 0}
    engine, *_ = start({**ADAM, "zero_optimization": section}, model)
    assert (
        safe_get_full_fp32_param(model[0].weight) is None
        and safe_get_local_fp32_param(model[0].weight) is None
    )
    engine.backward(engine(torch.ones(1, 4)).sum())
    sizes = [safe_get_local_grad(model[1].bias).numel(), safe_get_local_fp32_param(model[1].bias).numel()]
    whole = torch.tensor(sizes)
    torch.distributed.all_reduce(whole)
    assert whole.tolist() == [1, 1]  # one number on two ranks
    engine.destroy()


class Section(DeepSpeedConfigModel):
    """A user's own section, with a field that has a new name."""

    old: int | None = Field(
        None,
        json_schema_extra={"deprecated": True, "new_param": "new", "new_param_fn": lambda value: [value]},
    )
    new: list[int] | None = None


def test_a_field_that_has_a_new_name() -> None:
    assert Section(old=3).new == [3] and Section(new=[4]).new == [4]
    with pytest.raises(AssertionError, match="cannot both be given"):
        Section(old=3, new=[4])
    with pytest.raises(ValidationError):
        Section(new=3)
    with pytest.raises(ValidationError, match="finite"):
        DeepSpeedFP16Config(loss_scale=float("inf"))
