"""`deepspeed.moe.utils`: which parameters belong to experts, and optimizer groups that keep them apart.

ds_zero does not need such groups, and accepts them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ds_moe.deepspeed.layer import MoE

_LARGEST_GROUP = 178956971
"""DeepSpeed's default limit of a group of experts, in elements."""


def is_moe_param(param: Tensor) -> bool:
    """Whether an expert layer marked it."""
    return hasattr(param, "allreduce") and not param.allreduce


def has_moe_layers(m: nn.Module) -> tuple[bool, int]:
    """Returns whether a module is or contains a `MoE`, and the number of experts of the first one."""
    first = next((module for module in m.modules() if isinstance(module, MoE)), None)
    return (False, 0) if first is None else (True, first.num_experts)


def split_params_into_different_moe_groups_for_optimizer(
    param_groups: dict[str, Any] | Sequence[dict[str, Any]], max_group_size: float | None = _LARGEST_GROUP
) -> list[dict[str, Any]]:
    """Returns the groups without parameters of experts, followed by those of experts: for each group and each
    `group_name` one or more groups with "moe" true and the same options.

    Args:
        max_group_size: largest number of elements of a group of experts. None: no limit.
    """
    groups = [param_groups] if isinstance(param_groups, dict) else list(param_groups)
    dense, experts = [], []
    for group in groups:
        members = list(group["params"])
        by_name: dict[str, list[Any]] = {}
        for param in members:
            if is_moe_param(param):
                by_name.setdefault(param.group_name, []).append(param)
        if not by_name:
            dense.append(group)
            continue
        dense.append({**group, "params": [p for p in members if not is_moe_param(p)]})
        for name, params in by_name.items():
            experts += [
                {**group, "params": run, "moe": True, "name": name} for run in _runs(params, max_group_size)
            ]
    return dense + experts


def configure_moe_param_groups(model_parameters: Iterable[Any]) -> list[dict[str, Any]]:
    """The same for a list of parameters or of groups."""
    given = list(model_parameters)
    if given and isinstance(given[0], dict):
        return split_params_into_different_moe_groups_for_optimizer(given)
    return split_params_into_different_moe_groups_for_optimizer({"params": given, "name": "parameters"})


def _runs(params: list[Any], limit: float | None) -> list[list[Any]]:
    """Cuts a list into runs of at most `limit` elements; a larger parameter is a run of its own."""
    runs: list[list[Any]] = [[]]
    filled = 0
    for param in params:
        if runs[-1] and limit is not None and filled + param.numel() > limit:
            runs.append([])
            filled = 0
        runs[-1].append(param)
        filled += param.numel()
    return runs
