"""The options of an optimizer's groups (lr, betas, ...), and the families of optimizers with the same states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ds_checkpoint.format import codec

FAMILIES: Mapping[str, str] = {"FusedAdam": "adam", "CPUAdam": "adam", "Adam": "adam", "AdamW": "adam"}
"""Class name -> family of optimizers with the same states. The family of another class is its name without our
prefix.
"""


def family(optimizer: Optimizer) -> str:
    """Returns the name of the family whose optimizers share states."""
    while isinstance(inner := getattr(optimizer, "inner", None), Optimizer):
        optimizer = inner  # ds_offload's PagedOptimizer has the states of the optimizer in it
    names = [kind.__name__ for kind in type(optimizer).__mro__]  # a subclass has the states of its base class
    known = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    return known or names[0].removeprefix("Fused").removeprefix("CPU").lower()


def encode_groups(optimizer: Optimizer, tensors: dict[str, Tensor], prefix: str) -> list[dict[str, Any]]:
    """Encodes size and options of each group as JSON; `tensors` receives the tensors among them."""
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
    """Restores the options of each group; an empty list changes nothing."""
    for group, saved in zip(optimizer.param_groups, options, strict=bool(options)):
        for key, value in saved.items():
            if isinstance(group.get(key), Tensor):
                # A learning rate that a captured graph reads must stay the same tensor.
                group[key].copy_(torch.as_tensor(value))
            else:
                group[key] = value
