"""Connects the mixtures of experts of a model with the ranks of a job. ds_moe is imported only where its layers are."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

import ds_zero
from ds_engine.build.topology import Meshes
from ds_engine.config import ConfigError
from ds_engine.job import Job


def mesh_for(model: nn.Module, meshes: Meshes, reduces_itself: bool) -> ds_zero.MeshFor | None:
    """Returns which ranks hold the same experts; None if no layer divides its experts. Collective.

    Args:
        reduces_itself: whether the optimizer averages gradients, as 1-bit Adam does.

    Raises:
        ConfigError: the experts of a layer cannot be divided among these ranks, or with this optimizer.
    """
    # A model has such layers only if ds_moe was imported to make them.
    if "ds_moe" not in sys.modules:
        return None
    import ds_moe

    try:
        experts = ds_moe.expert_mesh(model, meshes.data)
    except ds_moe.ExpertParallelError as error:
        raise ConfigError([str(error)]) from None
    if not experts.meshes:
        return None
    if reduces_itself:
        raise ConfigError(
            [
                "optimizer: it averages each gradient over all ranks, but the model divides its experts, so that ranks "
                'hold different ones; set optimizer.type to "AdamW", or ep_size of the layers to 1'
            ]
        )
    return experts


def curves(job: Job, model: nn.Module) -> Callable[[int], Mapping[str, float]] | None:
    """Returns what computes the curves of experts after a step, on all ranks: for each layer the share of its tokens
    that each expert was chosen by, the share of dropped assignments, and the mean entropy of the router, since the last
    time. None if no monitor writes them, or the model has no experts.
    """
    settings = job.settings
    monitors = (settings.csv_monitor, settings.tensorboard, settings.wandb, settings.comet)
    if "ds_moe" not in sys.modules or not any(monitor.enabled for monitor in monitors):
        return None
    import ds_moe

    # The ranks of a pipeline have different layers, which no collective can add up.
    if job.pipeline is not None or not ds_moe.has_experts(model):
        return None
    every = settings.steps_per_print or 1

    def of_step(step: int) -> Mapping[str, float]:
        values: dict[str, float] = {}
        if step % every != 0:
            return values
        for report in ds_moe.reports(model):
            assignments = max(sum(report.load), 1)
            prefix = f"Train/Experts/{report.name}"
            for expert, load in enumerate(report.load):
                values[f"{prefix}/load_{expert}"] = load / assignments
            values[f"{prefix}/dropped"] = report.dropped / assignments
            if not math.isnan(report.entropy):
                values[f"{prefix}/entropy"] = report.entropy
        return values

    return of_step


def balance(model: nn.Module, optimizer: Optimizer, meshes: Meshes) -> None:
    """Lets every step of the optimizer move the biases of routers that are balanced by them."""
    if "ds_moe" not in sys.modules:
        return
    import ds_moe

    if not ds_moe.has_biases(model):
        return
    mesh = meshes.data
    axes = () if mesh is None else tuple(mesh.get_group(axis) for axis in range(mesh.ndim))
    groups: tuple[dist.ProcessGroup, ...] | None = axes or None

    def after_step(*_: Any) -> None:
        ds_moe.update_biases(model, groups)

    optimizer.register_step_post_hook(after_step)
