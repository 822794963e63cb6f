"""What a training loop calls besides the model: reports, and the balancing of experts by biases."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import nn

from ds_moe.hugging_face import ConvertedExperts
from ds_moe.layer import MoELayer
from ds_moe.report import LayerReport, summed
from ds_moe.routing.router import Router


def reports(model: nn.Module, group: dist.ProcessGroup | None = None) -> list[LayerReport]:
    """Returns what each layer has seen in training since the last call. Collective.

    Forwards that are computed again for activation checkpoints count again.

    Args:
        group: the ranks that have different tokens. Default: all ranks.
    """
    own = []
    for name, layer in model.named_modules():
        if isinstance(layer, (MoELayer, ConvertedExperts)):
            device = next(layer.parameters()).device
            num_experts = layer.num_experts
            own.append(summed(name, layer.counters, num_experts, _all_ranks(group), device))
            layer.counters.clear()
    return own


def has_experts(model: nn.Module) -> bool:
    """Whether the model has layers of this package, so that `reports` returns something."""
    return any(isinstance(layer, (MoELayer, ConvertedExperts)) for layer in model.modules())


def has_biases(model: nn.Module) -> bool:
    """Whether a router of the model is balanced by biases, so that `update_biases` has an effect."""
    return any(layer.bias is not None for layer in model.modules() if isinstance(layer, Router))


def update_biases(model: nn.Module, groups: Sequence[dist.ProcessGroup] | None = None) -> None:
    """Moves the biases of all routers with `bias_rate` against the load since the last call; to be called after
    `optimizer.step()`. Collective.

    Args:
        groups: the axes of ranks that have different tokens. Default: all ranks.
    """
    if groups is None:
        every = _all_ranks(None)
        groups = [every] if every is not None else []
    for layer in model.modules():
        if isinstance(layer, Router):
            layer.update_bias(groups)


def _all_ranks(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    if group is not None or not dist.is_initialized():
        return group
    return dist.group.WORLD
