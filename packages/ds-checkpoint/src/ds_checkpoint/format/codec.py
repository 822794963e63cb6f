"""Encodes user values (`client_state`, schedules) as JSON and tensors. There is no pickle: reading a checkpoint never
runs code.

JSON has fewer types than Python; the others are written as an object with one key that starts with "$".
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

Scalar = (bool, int, str, float)

_OTHERS: Mapping[str, Callable[[Any], Any]] = {
    "$namespace": lambda values: argparse.Namespace(**values),
    "$set": set,
    "$bytes": bytes.fromhex,
    "$path": Path,
    "$dtype": lambda name: getattr(torch, name),
    "$ndarray": lambda tensor: tensor.numpy(),
}
"""How values without a JSON type are encoded."""


def encode(value: Any, where: str, tensors: dict[str, Tensor], prefix: str) -> Any:
    """Returns `value` as an object for json.dumps, from which `decode` makes an equal value.

    Args:
        where: name of the value in errors, for example 'client_state'.
        tensors: receives the tensors under names that start with `prefix`.

    Raises:
        ValueError: a value of another type; the message names its path in `value`.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, Tensor):
        name = f"{prefix}/{len(tensors)}"
        tensors[name] = value
        return {"$tensor": name}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, list):
        return [encode(v, f"{where}[{i}]", tensors, prefix) for i, v in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [encode(v, f"{where}[{i}]", tensors, prefix) for i, v in enumerate(value)]}
    if isinstance(value, dict):
        return _encode_dict(value, where, tensors, prefix)
    other = _encode_other(value, where, tensors, prefix)
    if other is not None:
        return other
    raise ValueError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}: a checkpoint holds None, bool, "
        "int, float, str, bytes, list, tuple, set, dict, argparse.Namespace, paths, dtypes, numpy arrays and "
        "torch.Tensor, and no pickle; convert it to one of those"
    )


def _encode_other(value: Any, where: str, tensors: dict[str, Tensor], prefix: str) -> Any:
    """Encodes further types that training scripts use; None for any other type."""
    if isinstance(value, (bool, int, str)):  # a subclass, such as an IntEnum, is saved as the plain value
        return (
            value.value if isinstance(value, Enum) else str(value) if isinstance(value, str) else int(value)
        )
    if isinstance(value, argparse.Namespace):
        return {"$namespace": _encode_dict(vars(value), where, tensors, prefix)}
    if isinstance(value, (set, frozenset)):
        return {"$set": [encode(v, where, tensors, prefix) for v in sorted(value, key=repr)]}
    if isinstance(value, bytes):
        return {"$bytes": value.hex()}
    if isinstance(value, PurePath):
        return {"$path": str(value)}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, np.generic):
        return encode(value.item(), where, tensors, prefix)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {"$ndarray": encode(torch.from_numpy(value.copy()), where, tensors, prefix)}
    return None


def _encode_dict(value: dict[Any, Any], where: str, tensors: dict[str, Tensor], prefix: str) -> Any:
    for key in value:
        if type(key) not in Scalar and key is not None:
            raise ValueError(
                f"{where} has a key of type {type(key).__qualname__}, {key!r}: use a string or a number"
            )
    plain = all(type(k) is str and not k.startswith("$") for k in value) and not isinstance(value, Counter)
    if plain:
        return {k: encode(v, f"{where}[{k!r}]", tensors, prefix) for k, v in value.items()}
    pairs = [
        [encode(k, where, tensors, prefix), encode(v, f"{where}[{k!r}]", tensors, prefix)]
        for k, v in value.items()
    ]
    return {"$counter" if isinstance(value, Counter) else "$items": pairs}


def decode(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    """Returns the value that was passed to `encode`; `tensor` returns a tensor by its name."""
    if isinstance(value, list):
        return [decode(v, tensor) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        kind, inner = next(iter(value.items()))
        if kind == "$tensor":
            return tensor(inner)
        if kind == "$float":
            return float(inner)
        if kind == "$tuple":
            return tuple(decode(v, tensor) for v in inner)
        if kind in _OTHERS:
            return _OTHERS[kind](decode(inner, tensor))
        if kind in ("$items", "$counter"):
            pairs = {decode(k, tensor): decode(v, tensor) for k, v in inner}
            return Counter(pairs) if kind == "$counter" else pairs
    return {k: decode(v, tensor) for k, v in value.items()}
