"""An optimizer over other tensors than its own, to see what one step makes of them."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any

from torch.optim import Optimizer

from ds_zero.interfaces import PagesState


def reproduce(optimizer: Optimizer, groups: list[list[Any]]) -> Optimizer:
    """An optimizer of the same class and options over other tensors, without state or hooks."""
    while isinstance(optimizer, PagesState):
        optimizer = optimizer.inner
    made: Optimizer = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        made.__dict__[name] = OrderedDict() if isinstance(value, OrderedDict) else value
    made.state = defaultdict(dict)
    made.param_groups = [
        {**group, "params": params} for group, params in zip(optimizer.param_groups, groups, strict=True)
    ]
    return made
