"""ds_zero for inference: parameters are sharded, and the optimizer is a placeholder."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

import ds_zero
from ds_engine import rules
from ds_engine.build import moe, zero
from ds_engine.build.topology import topology_of
from ds_engine.config import load as load_config
from ds_engine.config.sections.inference import InferenceConfig
from ds_engine.interfaces import World
from ds_engine.job import choices_of, describe


def waits_for_values(model: nn.Module) -> bool:
    """Whether the model was constructed under `deferred_init` or `divided_init`, and was not sharded yet."""
    return any(ds_zero.presence(p) is not None for p in model.parameters())


def divide(model: nn.Module, config: InferenceConfig, world: World, stage_3: dict[str, object]) -> None:
    """Shards the parameters. Collective.

    Args:
        stage_3: the section `zero_optimization`.
    """
    settings = load_config({"train_micro_batch_size_per_gpu": 1, "zero_optimization": stage_3})
    choices = choices_of(settings, torch.optim.SGD)
    rules.check(choices)
    topology, meshes = topology_of(settings, world)
    meshes = moe.connect(model, settings, topology, meshes, world)
    job = describe(choices, topology, world.device.type)
    # Inference uses one dtype, which is not in a training section.
    job = replace(job, precision=replace(job.precision, param_dtype=config.dtype))
    nothing = torch.optim.SGD([{"params": []}], lr=0.0)
    zero.shard(job, model, nothing, meshes, world.device)


def undivide(model: nn.Module) -> None:
    """Makes the model an ordinary model again, whole on every rank. Collective."""
    ds_zero.destroy(model)
