"""Values inside nested lists, tuples and dicts, and attributes at dotted names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor


def recursive_getattr(model: Any, module_name: str) -> Any:
    """The attribute at a dotted name."""
    return functools.reduce(getattr, module_name.split("."), model)


def recursive_setattr(model: Any, module_name: str, module: Any) -> None:
    """Set the attribute at a dotted name."""
    parent, _, leaf = module_name.rpartition(".")
    setattr(recursive_getattr(model, parent) if parent else model, leaf, module)


def get_val_by_key(d: dict[str, Any], k: str) -> Any:
    """The value of a key at any depth; None if there is none."""
    if k in d:
        return d[k]
    inner = (get_val_by_key(v, k) for v in d.values() if isinstance(v, dict))
    return next((v for v in inner if v is not None), None)


def set_val_by_key(d: dict[str, Any], k: str, vv: Any) -> None:
    """Replace the value of a key at every depth where it is."""
    if k in d:
        d[k] = vv
    for inner in d.values():
        if isinstance(inner, dict):
            set_val_by_key(inner, k, vv)


def move_to_device(item: Any, device: Any, criterion_func: Callable[[Any], bool] | None = None) -> Any:
    """Tensors inside lists, tuples and dicts on `device`."""
    if isinstance(item, Tensor):
        return item.to(device) if criterion_func is None or criterion_func(item) else item
    if isinstance(item, (list, tuple)):
        return type(item)(move_to_device(v, device, criterion_func) for v in item)
    if isinstance(item, dict):
        return {k: move_to_device(v, device, criterion_func) for k, v in item.items()}
    return item


def clone_tensors_for_torch_save(item: Any, device: Any = "cpu") -> Any:
    """A copy of nested lists, tuples and dicts whose tensors have memory of their own, on `device`."""
    if isinstance(item, Tensor):
        return item.detach().to(device, copy=True)
    if isinstance(item, (list, tuple)):
        return type(item)(clone_tensors_for_torch_save(v, device) for v in item)
    if isinstance(item, dict):
        return type(item)((k, clone_tensors_for_torch_save(v, device)) for k, v in item.items())
    return item
