"""What trainers and libraries call on DeepSpeed, one test for each of them."""

from __future__ import annotations

import datetime
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import deepspeed
from compat.zero.test_construction import CONFIG, net
from harness import ranks


def _step(engine: Any) -> None:
    engine.backward(engine(torch.randn(2, 6)).square().mean())
    engine.step()


def _initialize_with_ignored_keys(*, model: nn.Module, config: dict[str, Any]) -> Any:
    """An engine; rank 0 warns of keys that have no effect."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine, *_ = deepspeed.initialize(model=model, config=config)
    assert any("ignored" in str(warning.message) for warning in caught) == (dist.get_rank() == 0)
    return engine


@ranks(2)
def test_trl() -> None:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    given = {
        **CONFIG,
        "zero_optimization.reduce_bucket_size": 1000,
        "zero_optimization.stage3_max_live_parameters": 9,
    }
    engine = _initialize_with_ignored_keys(model=net(), config=given)
    assert deepspeed.comm.get_rank() == dist.get_rank()
    hidden = [p for p in engine.parameters() if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    with deepspeed.zero.GatheredParameters(hidden):
        assert all(p.ds_status == ZeroParamStatus.AVAILABLE for p in hidden)
    assert hidden and hidden[0].ds_active_sub_modules == set()
    engine.destroy()


@ranks(2)
def test_peft() -> None:
    engine, *_ = deepspeed.initialize(model=net(), config=CONFIG)
    weight = engine.module[0].weight
    assert (weight.ds_shape, weight.ds_numel) == (weight.shape, weight.numel())
    with deepspeed.zero.GatheredParameters(weight, modifier_rank=0, fwd_module=engine.module):
        if dist.get_rank() == 0:
            weight.data.fill_(0.25)
    with deepspeed.zero.GatheredParameters(weight):
        assert torch.equal(weight, torch.full_like(weight, 0.25))
    assert deepspeed.utils.safe_get_full_grad(weight) is None
    engine.backward(engine(torch.randn(2, 6)).sum())
    assert deepspeed.utils.safe_get_full_grad(weight).shape == weight.shape
    engine.destroy()


@ranks(2)
def test_ms_swift() -> None:
    """It wraps `initialize` and the engine's consolidation, and moves the slices of parameters."""
    engines: list[Any] = []
    before = deepspeed.initialize

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        made = before(*args, **kwargs)
        consolidated = made[0]._zero3_consolidated_16bit_state_dict
        made[0]._zero3_consolidated_16bit_state_dict = lambda *a, **k: (
            engines.append(a),
            consolidated(*a, **k),
        )[1]
        return made

    deepspeed.initialize = wrapped
    try:
        engine, *_ = deepspeed.initialize(model=net(), config=CONFIG)
    finally:
        deepspeed.initialize = before
    state = engine._zero3_consolidated_16bit_state_dict()
    assert len(engines) == 1 and (state is None) == (dist.get_rank() > 0)
    for param in engine.module.parameters():
        assert isinstance(param.ds_id, int)
        param.ds_tensor.data = param.ds_tensor.data.to("cpu")
    _step(engine)
    from deepspeed.elasticity import compute_elastic_config

    section = {"enabled": True, "max_train_batch_size": 32, "micro_batch_sizes": [2, 4]}
    assert compute_elastic_config({"elasticity": section}, "0.19.8", world_size=2) == (
        24,
        [1, 2, 3, 4, 6, 12],
        4,
    )
    engine.destroy()


@ranks(2)
def test_llama_factory() -> None:
    from deepspeed.profiling.flops_profiler import get_model_profile

    model = net()
    assert len(deepspeed.utils.set_z3_leaf_modules(model, [nn.Linear])) == 2
    assert deepspeed.utils.set_z3_leaf_modules(model, ["Linear"])
    given = {**CONFIG, "_comment": "from a tutorial", "comms_config": {"verbose": False}}
    engine = _initialize_with_ignored_keys(model=model, config=given)
    _step(engine)
    assert deepspeed.accelerator.get_accelerator().device_name() == engine.device.type
    flops, macs, params = get_model_profile(model, (2, 6), print_profile=False, as_string=False)
    assert flops >= 2 * macs > 0
    assert params == sum(p.numel() for p in model.parameters())
    engine.destroy()


@ranks(2)
def test_openrlhf() -> None:
    from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
    from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum

    deepspeed.init_distributed(timeout=datetime.timedelta(minutes=5))
    given = {**CONFIG, "gradient_clipping": "auto", "train_batch_size": "auto"}
    given["zero_optimization"] = {**CONFIG["zero_optimization"], "reduce_bucket_size": "auto"}
    model = net()
    engine, optimizer, _, schedule = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        lr_scheduler=lambda made: torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1.0 / (step + 1)),
        config=given,
        args={"local_rank": dist.get_rank()},
        dist_init_required=True,
    )
    _step(engine)
    assert schedule.get_last_lr() == [0.005]
    optimizer.offload_states(
        include=[OffloadStateTypeEnum.optim_states, OffloadStateTypeEnum.hp_params],
        device=OffloadDeviceEnum.cpu,
        pin_memory=True,
        non_blocking=True,
    )
    engine.reload_states(non_blocking=True)
    engine.empty_partition_cache()
    state = engine._consolidated_16bit_state_dict()
    if dist.get_rank() == 0:
        copied = clone_tensors_for_torch_save(state)
        assert copied.keys() == state.keys() and copied["0.weight"] is not state["0.weight"]
    half = deepspeed.tp_model_init(model=net(), tp_size=2, dtype=torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16
    engine.destroy()


@ranks(2)
def test_axolotl() -> None:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    deepspeed.comm.init_distributed(dist_backend="gloo")
    given = {**CONFIG, "compile": {"disable": True, "backend": "inductor"}}
    engine = _initialize_with_ignored_keys(model=net(), config=given)
    x = torch.randn(1, 4, 6)
    with torch.no_grad(), deepspeed.zero.GatheredParameters(list(engine.parameters())):
        tiled = TiledMLP.apply(lambda mlp, part: mlp(part), engine.module[0], x, 2, [])
        assert torch.allclose(tiled, engine.module[0](x), atol=1e-6)
    engine.destroy()
