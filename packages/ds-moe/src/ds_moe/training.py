"""What a training loop calls besides the model: reports, and the balancing of experts by biases."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from ds_moe.layer import moe_layers
from ds_moe.report import LayerReport, summed


def reports(model: nn.Module, group: dist.ProcessGroup | None = None) -> list[LayerReport]:
    """Returns what each layer has seen in training since the last call. Collective.

    Forwards that are computed again for activation checkpoints count again.

    Args:
        group: the ranks that have different tokens. Default: all ranks.
    """
    own = []
    for name, layer in moe_layers(model):
        device = layer.router.weight.device
        own.append(summed(name, layer.counters, layer.options.num_experts, _all_ranks(group), device))
        layer.counters.clear()
    return own


def update_biases(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Moves the biases of all routers with `bias_rate` against the load since the last call; to be called after
    `optimizer.step()`. Collective.

    Args:
        group: the ranks that have different tokens. Default: all ranks.
    """
    for _, layer in moe_layers(model):
        layer.router.update_bias(_all_ranks(group))


def _all_ranks(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    if group is not None or not dist.is_initialized():
        return group
    return dist.group.WORLD
