"""`init_inference`: inference with a model that is whole on every rank or sharded."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_engine.build import inference as sharding
from ds_engine.build import moe, ranks, weights
from ds_engine.build.zero import is_divided
from ds_engine.config import ConfigError
from ds_engine.config.sections.inference import InferenceConfig, read_inference
from ds_engine.inference.generation import generate_of
from ds_engine.interfaces import World


def init_inference(
    model: nn.Module,
    config: str | os.PathLike[str] | Mapping[str, Any] | InferenceConfig | None = None,
    **settings: Any,
) -> InferenceEngine:
    """Builds an engine that runs `model` without gradients. Initialises the process group if there is none. All ranks
    must call it with the same arguments.

    With `zero={"stage": 3}`, with `tensor_parallel={"tp_size": N}`, or if the model was constructed under
    `deferred_init(stage=3)`, the parameters are sharded, and gathered module by module during forward. A model that
    is too large for one rank then needs 1/N of its memory on each of N ranks. Layers are not split. With `ep_size=N`,
    the experts of a Hugging Face model are divided among N consecutive ranks, to which tokens travel.

    Args:
        config: path of a JSON file, or a dict; see `InferenceConfig`.
        settings: the same keys, as arguments.

    Raises:
        ConfigError: a mistake in the configuration, or an unsupported key that would change results. CheckpointError,
            FileNotFoundError: the weights are damaged, do not match the model, or do not exist.
    """
    wanted = config if isinstance(config, InferenceConfig) else read_inference(merged(config, settings))
    world = ranks.start()
    waiting = sharding.waits_for_values(model)
    if not waiting and any(p.is_meta for p in model.parameters()):
        raise ValueError(
            "the model has parameters on the meta device that have no values: construct it under "
            "ds_zero.deferred_init(stage=3), or deepspeed.zero.Init() in code for DeepSpeed"
        )
    model.eval().requires_grad_(False)
    if wanted.dtype is not None and not waiting:
        model.to(wanted.dtype)
    if world.device.type != "cpu" and not waiting and not wanted.keep_module_on_host:
        model.to(world.device)
    experts = _divide_experts(model, wanted, world, waiting)
    sharded = _divide(model, wanted, world, waiting)
    if experts and not sharded:
        moe.connect_for_inference(model)
    if wanted.checkpoint is not None:
        with weights.open_weights(wanted.checkpoint, wanted.base_dir) as stored:
            weights.fill(model, stored)
    return InferenceEngine(model, wanted, sharded=sharded, experts=experts)


def merged(
    config: str | os.PathLike[str] | Mapping[str, Any] | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Merges both into one dict.

    Raises:
        ValueError: a key has two different values.
    """
    given: dict[str, Any] = {}
    if isinstance(config, (str, os.PathLike)):
        given |= json.loads(Path(config).read_text(encoding="utf-8"))
    elif config is not None:
        given |= config
    for key, value in settings.items():
        if key in given and given[key] != value:
            raise ValueError(f"Conflicting argument '{key}' in 'config':{given[key]} and kwargs:{value}")
    return given | dict(settings)


def _divide_experts(model: nn.Module, config: InferenceConfig, world: World, waiting: bool) -> bool:
    """Divides experts if configured. Returns whether a rank has only some."""
    size = config.expert_ranks
    if size > 1 and (waiting or config.checkpoint is not None):
        what = "checkpoint" if config.checkpoint is not None else "ds_zero.deferred_init"
        raise ConfigError(
            [f"ep_size is {size}: experts are divided when they have values, and {what} gives them later: load them "
             "into the model first"],
            "the inference configuration",
        )  # fmt: skip
    return moe.divide_for_inference(model, size, world)


def _divide(model: nn.Module, config: InferenceConfig, world: World, waiting: bool) -> bool:
    """Shards the parameters if configured. Returns whether it did."""
    section = dict(config.zero)
    stage, copy = section.get("stage", 0), config.copy_ranks
    if world.world_size % copy:
        raise ConfigError([f"tensor_parallel.tp_size {copy} does not divide {world.world_size} ranks"])
    if stage in (1, 2):
        warnings.warn(
            f"init_inference: zero.stage {stage} has no effect in inference, which has no gradients and "
            "optimizer states: set it to 3 to shard parameters, or to 0",
            stacklevel=3,
        )
    if not waiting and stage != 3 and copy == 1:
        return False
    section["stage"] = 3
    if copy > 1:
        section.setdefault("mics_shard_size", copy)
    sharding.divide(model, config, world, section)
    if config.dtype is not None:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.data.to(config.dtype)
    return True


class InferenceEngine(nn.Module):
    """Runs a module without gradients. Attributes that it does not have are looked up in the module."""

    module: nn.Module

    def __init__(
        self, module: nn.Module, config: InferenceConfig, *, sharded: bool, experts: bool = False
    ) -> None:
        super().__init__()
        self.module = module
        self.inference_config = config
        self.sharded = sharded
        """Whether the parameters are sharded. Then all ranks must run forward at the same time."""
        self.experts = experts
        """Whether experts are on different ranks. Then all ranks must run forward at the same time, too."""
        self.training = False  # the current mode of the module

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's forward."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's own `generate`. Ranks may finish at different lengths."""
        return generate_of(self.module, divided=self.experts or is_divided(self.module))(*args, **kwargs)

    def destroy(self) -> None:
        """Undoes the sharding: the module is an ordinary module again, whole on every rank. Safe to call twice."""
        if self.sharded:
            self.sharded = False
            sharding.undivide(self.module)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
        return getattr(self.module, name)
