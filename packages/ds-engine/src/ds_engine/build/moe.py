"""Connects the mixtures of experts of a model with the ranks of a job. ds_moe is imported only where its layers are."""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

import ds_zero
from ds_engine.build.topology import Meshes
from ds_engine.config import ConfigError


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
