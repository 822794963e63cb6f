"""`deepspeed.initialize`, and its command-line arguments."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import ds_engine
from ds_compat.comm import collectives as comm
from ds_compat.comm import groups
from ds_compat.comm.slices import training_comm
from ds_compat.config import deepspeed_config as configs
from ds_compat.engine import previous
from ds_compat.engine.engine import DeepSpeedEngine
from ds_compat.engine.tensor_parallel import TensorMpu, with_tensor
from ds_compat.refused import NotThereError
from ds_compat.sequence.groups import mpu_of_config, with_sequence
from ds_compat.utils.logs import logger, set_log_level_from_string
from ds_compat.zero import params
from ds_compat.zero.construction import outside_init
from ds_compat.zero.leaf_modules import mark_configured, z3_leaf_module


@outside_init()
def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Optimizer | Callable[[Any], Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    mesh_param: Any = None,
    config_params: str | os.PathLike[str] | Mapping[str, Any] | None = None,
) -> tuple[DeepSpeedEngine, Any, Any, Any]:
    """Creates an engine for `model`. The arguments are those of DeepSpeed; `ds_engine.initialize` describes them.

    If the model already has an engine, that is destroyed, with a warning.

    Returns:
        (engine, optimizer, loader of `training_data` or None, schedule or None).

    Raises:
        DeepSpeedConfigError (a ds_engine.ConfigError): a mistake in the configuration.
        NotImplementedError: a dtype of gradient sums that DeepSpeed does not support at stage 0.
    """
    assert model is not None, "deepspeed.initialize requires a model"
    _refuse_parallel(mpu)
    previous.release(model)
    _rank_from_arguments(args)
    comm.init_distributed(distributed_port=distributed_port, dist_init_required=dist_init_required)
    given = with_sequence(configs.read(_the_config(args, config, config_params)), mesh_param)
    given = with_tensor(given, model)
    if mpu is None:
        mpu = mpu_of_config(given)
    if given.get("log_level") is not None:
        set_log_level_from_string(given["log_level"])
    passed = {"optimizer": optimizer, "scheduler": lr_scheduler}
    grid = _grid_of(model)
    assert grid is None or mpu is None, "mpu must be None with pipeline parallelism: it is that of the module"
    resolved = configs.DeepSpeedConfig(_effective(given, model, passed), grid or mpu)
    has_optimizer = optimizer is not None or resolved.typed.optimizer is not None
    if has_optimizer:
        _refuse_mixture(resolved.typed)
    with configs.told():
        engine, _, loader, schedule = ds_engine.initialize(
            model=model,
            config=resolved.typed,
            optimizer=optimizer if has_optimizer else _no_optimizer,
            model_parameters=model_parameters,
            training_data=training_data,
            lr_scheduler=_of_any_optimizer(lr_scheduler, optimizer),
            collate_fn=collate_fn,
            mpu=mpu,
            comm=None if resolved.typed.zero_optimization.rank_invariant else training_comm(),
        )
    _round_masters(engine)
    resolved.raw = given
    comm.note_log(engine.roles.comms_log)
    groups.set_mpu(grid or (TensorMpu(engine) if engine.roles.tensor_group is not None else mpu))
    params.present(p for p in model.parameters() if params.known(p))
    if engine.config.zero_optimization.stage == 3:
        mark_configured(model, engine.config.zero_optimization.leaf_module)
    made = _class_of(engine)(engine, resolved, has_optimizer=has_optimizer, mpu=grid or mpu)
    previous.note(model, made)
    made.training_dataloader, made.collate_fn, made.client_lr_scheduler = loader, collate_fn, lr_scheduler
    return made, made.optimizer, loader, schedule


def _grid_of(model: nn.Module) -> Any:
    """Returns the groups of a pipeline model; None for another model. Collective for a module of ds_pipe's."""
    if "ds_pipe.model" not in sys.modules:
        return None
    from ds_compat.pipe.grid import grid_of

    return grid_of(model)


def _class_of(engine: ds_engine.Engine) -> type[DeepSpeedEngine]:
    if not isinstance(engine, ds_engine.PipelineEngine):
        return DeepSpeedEngine
    from ds_compat.pipe.engine import PipelineEngine

    return PipelineEngine


def _refuse_parallel(mpu: Any) -> None:
    """Raises for model-parallel ranks: norms and overflow would silently ignore the other model-parallel ranks."""
    for kind in ("model", "pipe"):
        ask = getattr(mpu, f"get_{kind}_parallel_world_size", None)
        if callable(ask) and ask() > 1:
            raise NotThereError(
                f"deepspeed.initialize(mpu=...) with {ask()} {kind}-parallel ranks is not supported yet: use "
                "ds_zero.shard(..., model_parallel=...), or an mpu of data-parallel ranks"
            )


@torch.no_grad()
def _round_masters(engine: ds_engine.Engine) -> None:
    """Rounds fp32 masters to the compute dtype, as in DeepSpeed, which casts the model first. ds_engine keeps the
    full precision, so losses would differ from the first step.
    """
    half = engine.precision.param_dtype
    for group in engine.optimizer.param_groups if half is not None else ():
        for shard in group["params"]:
            shard.copy_(shard.to(half))


def _refuse_mixture(config: ds_engine.DsConfig) -> None:
    """At stage 0 DeepSpeed sums gradients only in the dtype of the model, and code relies on this error."""
    own = "fp16" if config.fp16.enabled else "bf16" if config.bf16.enabled else "fp32"
    sums = config.data_types.grad_accum_dtype or own
    if config.zero_optimization.stage == 0 and sums != own:
        raise NotImplementedError(
            f"data_types.grad_accum_dtype {sums!r} for a model in {own} needs stage 1 or more in DeepSpeed: remove it, "
            "set zero_optimization.stage, or call ds_engine.initialize, which has no such limit"
        )


def _no_optimizer(_: Any) -> Optimizer:
    """Makes an optimizer without parameters, for engines that only evaluate."""
    return torch.optim.SGD([{"params": []}], lr=0.0)


def _rank_from_arguments(args: Any) -> None:
    """Sets the local rank from an argument, for old launchers."""
    local = getattr(args, "local_rank", None)
    if isinstance(local, int) and local >= 0:
        os.environ.setdefault("LOCAL_RANK", str(local))


def _the_config(args: Any, config: Any, config_params: Any) -> Any:
    config = config if config is not None else config_params
    named = [
        value
        for value in (getattr(args, "deepspeed_config", None), getattr(args, "deepscale_config", None))
        if value is not None
    ]
    assert len(named) + (config is not None) <= 1, (
        "Not sure how to proceed, we were given deepspeed configs in the deepspeed arguments and "
        "deepspeed.initialize() function call"
    )
    chosen = config if config is not None else named[0] if named else None
    assert chosen is not None, "DeepSpeed requires --deepspeed_config to specify configuration file"
    return chosen


def _of_any_optimizer(schedule: Any, optimizer: Any) -> Any:
    """Accepts a schedule of another optimizer, with a warning, as DeepSpeed does. ds_engine would refuse it."""
    if getattr(schedule, "optimizer", optimizer) is optimizer:
        return schedule
    logger.warning(
        f"{type(schedule).__name__} sets the learning rates of another optimizer than the engine's, so it has no "
        "effect on training"
    )
    return lambda _: schedule


_TAG_VALIDATION = frozenset({"ignore", "warn", "fail"})


def _effective(given: Mapping[str, Any], model: nn.Module, passed: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration for the engine: without the sections of an optimizer or schedule that was passed,
    which takes precedence in DeepSpeed, and with the leaf modules that were marked on the model.
    """
    config = dict(given)
    checkpoint = config.get("checkpoint")
    if isinstance(checkpoint, dict) and str(checkpoint.get("tag_validation")).lower() in _TAG_VALIDATION:
        # ds_engine always refuses different tags, and would warn that this setting has no effect.
        config["checkpoint"] = {k: v for k, v in checkpoint.items() if k != "tag_validation"}
    for name, value in passed.items():
        if value is not None and config.pop(name, None) is not None:
            logger.warning(f"the {name} passed to deepspeed.initialize is used, not the section {name}")
    leaves = [name for name, module in model.named_modules() if z3_leaf_module(module)]
    section = config.get("zero_optimization")
    if leaves and isinstance(section, dict) and section.get("stage") == 3:
        marked = dict(section.get("leaf_module") or {})
        marked["names"] = [*marked.get("names", []), *leaves]
        config["zero_optimization"] = {**section, "leaf_module": marked}
    return config


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds --deepspeed and --deepspeed_config."""
    group = parser.add_argument_group("DeepSpeed", "DeepSpeed configurations")
    group.add_argument(
        "--deepspeed", action="store_true", help="a flag for your own code; ds-compat ignores it"
    )
    group.add_argument("--deepspeed_config", type=str, help="the configuration file")
    group.add_argument("--deepscale", action="store_true", help=argparse.SUPPRESS)
    group.add_argument("--deepscale_config", type=str, help=argparse.SUPPRESS)
    return parser
