"""Parameter groups of MuAdam, MuAdamW and MuSGD: learning rates that transfer from a narrow model to a wide one.

Source: Yang et al. 2022, Tensor Programs V (table 8). `mup.set_base_shapes` sets an attribute `infshape` on every
parameter. It contains the dimensions that grow with the width, and their growth factors. No other part of mup is
needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ds_engine.config.support.errors import ConfigError

NAMES = ("muadam", "muadamw", "musgd")
"""Values of `optimizer.type`, in lower case."""


def groups(
    name: str,
    parameters: Iterable[Any],
    *,
    lr: float,
    weight_decay: float,
    scale_decay: bool,
    names: Mapping[int, str],
) -> list[dict[str, Any]]:
    """Splits each group by how its parameters scale with the width, and sets the learning rate of each part.

    Args:
        name: one of `NAMES`, in any case.
        lr: learning rate, at the base width, of groups without their own.
        weight_decay: weight decay, at the base width, of groups without their own.
        scale_decay: scale weight_decay so that lr x weight_decay is the same as at the base width.
        names: id of a parameter -> its name, for errors.

    Raises:
        ConfigError: a parameter without `infshape`, or with more than two growing dimensions.
    """
    items = list(parameters)
    loose = [item for item in items if not isinstance(item, dict)]
    whole = [item for item in items if isinstance(item, dict)] + ([{"params": loose}] if loose else [])
    cut: list[dict[str, Any]] = []
    for group in whole:
        parts: dict[float, list[Any]] = {}
        for parameter in group["params"]:
            parts.setdefault(_factor(name, parameter, names), []).append(parameter)
        base_lr, base_decay = group.get("lr", lr), group.get("weight_decay", weight_decay)
        for factor, members in parts.items():
            decay = base_decay / factor if scale_decay else base_decay
            cut.append({**group, "params": members, "lr": base_lr * factor, "weight_decay": decay})
    return cut


def _factor(name: str, parameter: Any, names: Mapping[int, str]) -> float:
    """Returns the factor of the learning rate of a parameter."""
    shape = getattr(parameter, "infshape", None)
    where = names.get(id(parameter), f"of shape {tuple(parameter.shape)}")
    if shape is None:
        raise ConfigError(
            [
                f"optimizer.type is {name}, and the parameter {where} has no infshape: call "
                "mup.set_base_shapes(model, base_model) before initialize()"
            ]
        )
    growing = shape.ninf()
    if growing > 2:
        raise ConfigError(
            [
                f"optimizer.type is {name}, and {growing} dimensions of the parameter {where} grow with the "
                "width, but at most 2 may"
            ]
        )
    if name.lower() == "musgd":
        if growing == 1:
            return float(shape.width_mult())
        return 1.0 / float(shape.fanin_fanout_mult_ratio()) if growing == 2 else 1.0
    return 1.0 / float(shape.width_mult()) if growing == 2 else 1.0
