"""Reads torch's pickled files without running what is in them.

A pickle names classes and functions, and Python's own reader imports and calls them. Here the few that make
tensors and plain containers are known by name; everything else becomes a `Stand` that remembers how it was to be
made and does nothing. So a file of unknown origin can be read, and what an unknown class held can be looked at.
"""

from __future__ import annotations

import pickle
import types
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from ds_checkpoint.errors import CheckpointError


def _of_any_type(make: Any, kind: Any, args: tuple[Any, ...], state: Any) -> Any:
    """A tensor that had attributes, or was of a subclass: the plain tensor without them."""
    return make(*args)


_TORCH_DTYPES = frozenset(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))
_KNOWN: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    ("torch._tensor", "_rebuild_from_type_v2"): _of_any_type,
    ("torch", "Tensor"): torch.Tensor,
    ("torch.nn.parameter", "Parameter"): torch.nn.Parameter,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch.storage", "UntypedStorage"): torch.UntypedStorage,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    ("builtins", "slice"): slice,
    ("builtins", "bytearray"): bytearray,
    ("__builtin__", "set"): set,
    ("__builtin__", "frozenset"): frozenset,
}


class Stand:
    """Stands for an object of a class that was not imported."""

    cls = ""
    """Module and name of that class."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Stand:
        made = super().__new__(cls)
        made.args = args
        made.state = {}
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args: tuple[Any, ...]
        """What it was to be constructed from."""
        self.state: dict[str, Any]
        """Its attributes."""

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.state.update(part)

    def __call__(self, *args: Any, **kwargs: Any) -> Stand:
        """What stands for a function gives what stands for its result."""
        return Stand(self, *args, **kwargs)

    # Pickles of dicts and lists by another name fill them through these.
    def __setitem__(self, key: Any, value: Any) -> None:
        self.state[key] = value

    def append(self, value: Any) -> None:
        self.args += (value,)

    def extend(self, values: Any) -> None:
        self.args += tuple(values)

    def __repr__(self) -> str:
        return f"<{self.cls}>"


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == "torch" and (name in _TORCH_DTYPES or name.endswith("Storage")):
            return getattr(torch, name)
        return type(name, (Stand,), {"cls": f"{module}.{name}"})


def _load(file: IO[bytes], **options: Any) -> Any:
    return _Unpickler(file, **options).load()


# What torch.load asks of the module that it is told to unpickle with.
_PICKLE = types.SimpleNamespace(__name__="ds_checkpoint.deepspeed.inert", Unpickler=_Unpickler, load=_load)


def read(path: Path) -> Any:
    """The content of a file that `torch.save` wrote. Tensors are mapped from the file, so only what is touched is
    read.

    Raises:
        CheckpointError: it is cut off, not such a file, or of the format before torch 1.6.
    """
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False, pickle_module=_PICKLE)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({str(error).splitlines()[0]}): it is damaged, was not written completely, or is "
            "not a file of torch.save's"
        ) from error
