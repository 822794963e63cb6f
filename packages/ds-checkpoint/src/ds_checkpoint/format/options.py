"""The options of an optimizer's groups (lr, betas, ...), and which optimizers have the same states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ds_checkpoint.format import codec

FAMILIES: Mapping[str, str] = {"FusedAdam": "adam", "CPUAdam": "adam", "Adam": "adam", "AdamW": "adam"}
"""Optimizers whose states mean the same; others go by their class name, less our prefix."""


def family(optimizer: Optimizer) -> str:
    """The name under which optimizers share their states."""
    names = [kind.__name__ for kind in type(optimizer).__mro__]  # a subclass has the states of its base
    known = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    return known or names[0].removeprefix("Fused").lower()


def encode_groups(optimizer: Optimizer, tensors: dict[str, Tensor], prefix: str) -> list[dict[str, Any]]:
    """Size and options of each group as JSON; `tensors` receives tensors among them."""
    return [
        {
            "num_params": len(group["params"]),
            "options": codec.encode(
                {k: v for k, v in group.items() if k != "params"},
                f"optimizer.param_groups[{i}]",
                tensors,
                prefix,
            ),
        }
        for i, group in enumerate(optimizer.param_groups)
    ]


def set_options(optimizer: Optimizer, options: Sequence[Mapping[str, Any]]) -> None:
    """Give each group its options back; none at all leaves them as they are."""
    for group, saved in zip(optimizer.param_groups, options, strict=bool(options)):
        for key, value in saved.items():
            if isinstance(group.get(key), Tensor):
                # A rate that a captured graph reads stays the same tensor.
                group[key].copy_(torch.as_tensor(value))
            else:
                group[key] = value
