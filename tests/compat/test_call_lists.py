"""What other trainers call on DeepSpeed, in their order and with their arguments, as their sources show it."""

from __future__ import annotations

import argparse
import random
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import deepspeed
from harness import ranks


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 1))


def batch(step: int) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))


def train(engine: Any, steps: int = 2) -> float:
    for step in range(steps):
        loss = engine(batch(step)).square().mean()
        engine.backward(loss)
        engine.step()
    return engine(batch(99)).square().mean().item()


def config(stage: int, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "startup_summary": False,
        **more,
    }


@ranks(2, timeout_s=240)
@pytest.mark.parametrize("stage", [2, 3])
def test_lightning(stage: int, tmp_path: Path) -> None:
    """`lightning.pytorch.strategies.DeepSpeedStrategy`."""
    deepspeed.init_distributed("gloo", distributed_port=29501)
    deepspeed.utils.logging.logger.setLevel("WARNING")
    given = config(
        stage,
        activation_checkpointing={
            "partition_activations": False,
            "cpu_checkpointing": False,
            "contiguous_memory_optimization": False,
            "synchronize_checkpoint_boundary": False,
        },
        aio={
            "block_size": 1048576,
            "queue_depth": 8,
            "single_submit": False,
            "overlap_events": True,
            "thread_count": 1,
        },
        gradient_clipping=1.0,
    )
    with deepspeed.zero.Init(enabled=stage == 3, remote_device=None, config_dict_or_path=given):
        model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    warnings.simplefilter("ignore")  # Lightning sends aio.thread_count, which is told to be ignored
    engine, returned, _, _ = deepspeed.initialize(
        args=argparse.Namespace(device_rank=0),
        config=given,
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        optimizer=optimizer,
        lr_scheduler=schedule,
        dist_init_required=False,
    )
    assert isinstance(engine, deepspeed.DeepSpeedEngine) and returned is not None
    deepspeed.checkpointing.configure(
        mpu_=None,
        partition_activations=False,
        contiguous_checkpointing=False,
        checkpoint_in_cpu=False,
        profile=False,
    )
    engine.lr_scheduler = None
    train(engine)
    state = {
        "epoch": 1,
        "loops": {"fit": {"progress": (1, 2)}},
        "callbacks": {"best": Path("x") / "y", "score": torch.tensor(0.5)},
        "hyper_parameters": argparse.Namespace(lr=0.1, dtype=torch.bfloat16),
        "rng": {"python": random.getstate(), "numpy": numpy.arange(3, dtype=numpy.int64)},
    }
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=None):
        pass
    engine.save_checkpoint(
        str(tmp_path), client_state=state, tag="checkpoint", exclude_frozen_parameters=True
    )
    wanted = engine(batch(99)).square().mean().item()
    train(engine)
    _, back = engine.load_checkpoint(
        str(tmp_path), load_optimizer_states=True, load_lr_scheduler_states=False, load_module_strict=True
    )
    assert engine(batch(99)).square().mean().item() == wanted
    assert (
        back["hyper_parameters"] == state["hyper_parameters"] and back["rng"]["python"] == random.getstate()
    )
    assert back["callbacks"]["best"] == Path("x/y") and (back["rng"]["numpy"] == numpy.arange(3)).all()
    engine.destroy()


@ranks(2, timeout_s=240)
def test_composer(tmp_path: Path) -> None:
    """MosaicML Composer: keyword arguments, its own tag, parts of a checkpoint."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, optimizer, _, _ = deepspeed.initialize(
        config=config(2), model=model, model_parameters=model.parameters(), optimizer=optimizer
    )
    trained = train(engine)
    engine.save_checkpoint(str(tmp_path), "deepspeed")
    train(engine)
    path, client = engine.load_checkpoint(
        str(tmp_path), tag="deepspeed", load_module_only=True, load_module_strict=True
    )
    assert path is not None and client is not None
    assert engine(batch(99)).square().mean().item() == trained
    assert engine.module is model and engine.optimizer is optimizer
    engine.destroy()


@ranks(2, timeout_s=240)
def test_determined(tmp_path: Path) -> None:
    """Determined's DeepSpeedTrial: sizes from the engine, its loader, several engines."""
    from deepspeed.runtime import config_utils
    from deepspeed.runtime.pipe.engine import PipelineEngine

    deepspeed.init_distributed(auto_mpi_discovery=False)
    with pytest.raises(ValueError, match="Duplicate"):
        config_utils.dict_raise_error_on_duplicate_keys([("a", 1), ("a", 2)])
    data = torch.utils.data.TensorDataset(torch.randn(64, 8))
    engines = [
        deepspeed.initialize(
            args=None,
            model=model,
            model_parameters=model.parameters(),
            training_data=data,
            config=config(1, optimizer={"type": "Adam", "params": {"lr": 1e-3}}),
        )[0]
        for model in (net(), net())
    ]
    for engine in engines:
        assert not isinstance(engine, PipelineEngine)
        assert (engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()) == (4, 1)
        assert engine.mpu is None and len(engine.training_dataloader) == 8
        batches = iter(deepspeed.utils.RepeatingLoader(engine.training_dataloader))
        engine.train()
        loss = engine(next(batches)[0]).square().mean()
        engine.backward(loss)
        engine.step()
        assert engine.is_gradient_accumulation_boundary()
        engine.save_checkpoint(str(tmp_path / str(id(engine) % 2)), tag="model0")
        engine.load_checkpoint(str(tmp_path / str(id(engine) % 2)), tag="model0")
    held_out = engines[0].deepspeed_io(data, batch_size=8, route="eval")
    assert len(held_out) == 4 and next(iter(held_out))[0].shape == (8, 8)
    for engine in engines:
        engine.destroy()


@ranks(2, timeout_s=240)
def test_mmengine(tmp_path: Path) -> None:
    """MMEngine's DeepSpeedStrategy: no model_parameters, client state, save_latest=False."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.runtime.fp16.onebit import OnebitAdam, OnebitLamb, ZeroOneAdam

    assert all((DeepSpeedCPUAdam, FusedAdam, FusedLamb, OnebitAdam, OnebitLamb, ZeroOneAdam))
    model = net()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=FusedAdam(model.parameters(), lr=1e-2, adam_w_mode=False),
        model_parameters=None,
        config=config(3),
    )
    trained = train(engine)
    engine.save_checkpoint(
        str(tmp_path), tag="epoch_1", client_state={"meta": {"epoch": 1, "iter": 2}}, save_latest=False
    )
    assert not (tmp_path / "latest").exists()
    train(engine)
    _, extra = engine.load_checkpoint(str(tmp_path), tag="epoch_1", load_optimizer_states=True)
    assert extra["meta"] == {"epoch": 1, "iter": 2}
    assert engine(batch(99)).square().mean().item() == trained
    engine.destroy()


@ranks(2, timeout_s=240)
def test_trl_style_reading_of_parameters() -> None:
    """The `maybe_zero_3` that LLaVA, FastChat and others carry."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    from deepspeed import zero

    model = net()
    given = config(3, optimizer={"type": "AdamW", "params": {"lr": 1e-3}})
    given["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine, *_ = deepspeed.initialize(model=model, config=given)

    def maybe_zero_3(param: nn.Parameter) -> Tensor:
        if hasattr(param, "ds_id"):
            assert param.ds_status == ZeroParamStatus.NOT_AVAILABLE
            with zero.GatheredParameters([param]):
                return param.data.detach().cpu().clone()
        return param.detach().cpu().clone()

    wanted = net().state_dict()
    found = {name: maybe_zero_3(param) for name, param in engine.module.named_parameters()}
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    count = sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in engine.module.parameters())
    assert count == sum(value.numel() for value in wanted.values())

    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_set_full_fp32_param

    engine.backward(engine(batch(0)).square().mean())
    weight = engine.module[0].weight
    assert safe_get_full_grad(weight).shape == (40, 8)
    safe_set_full_fp32_param(weight, torch.ones(40, 8))
    assert torch.equal(safe_get_full_fp32_param(weight), torch.ones(40, 8))
    engine.destroy()
