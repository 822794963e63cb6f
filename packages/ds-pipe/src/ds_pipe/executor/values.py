"""Values between stages: tensors inside of tuples, lists, dicts and anything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor in the skeleton of a value."""

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    on_host: bool
    """Whether it is in the memory of the host."""


def take_apart(value: Any) -> tuple[Any, list[Tensor]]:
    """Returns a value with a `Slot` in the place of each tensor, and the tensors."""
    tensors: list[Tensor] = []

    def slot(tensor: Tensor) -> Slot:
        tensors.append(tensor)
        on_host = tensor.device.type == "cpu"
        return Slot(len(tensors) - 1, tuple(tensor.shape), tensor.dtype, tensor.requires_grad, on_host)

    return _mapped(value, Tensor, slot), tensors


def put_together(skeleton: Any, tensors: Sequence[Tensor]) -> Any:
    """Returns the value of a skeleton."""
    return _mapped(skeleton, Slot, lambda slot: tensors[slot.index])


def slots(skeleton: Any) -> list[Slot]:
    """Returns the slots of a skeleton, in order."""
    found: list[Slot] = []
    _mapped(skeleton, Slot, found.append)
    return sorted(found, key=lambda slot: slot.index)


def as_leaves(value: Any) -> tuple[Any, list[Tensor]]:
    """Returns a value whose tensors are new leaves of the autograd graph, and these tensors."""
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        leaves.append(tensor.detach().requires_grad_(tensor.requires_grad))
        return leaves[-1]

    return _mapped(value, Tensor, leaf), leaves


def detached(value: Any) -> Any:
    """Returns a value whose tensors have no graph."""
    return _mapped(value, Tensor, Tensor.detach)


def _mapped(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(v, kind, function) for v in value))
    if type(value) in (tuple, list):
        return type(value)(_mapped(v, kind, function) for v in value)
    if type(value) is dict:
        return {k: _mapped(v, kind, function) for k, v in value.items()}
    return value
