"""Converts `Stand` objects to tensors and containers. Every number in the pickle is checked here before it is used."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ds_checkpoint.deepspeed.archive import Archive
from ds_checkpoint.deepspeed.stand import Stand
from ds_checkpoint.errors import CheckpointError

_STORAGES: Mapping[str, torch.dtype] = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.storage.UntypedStorage": torch.uint8,
    "torch.UntypedStorage": torch.uint8,
}
_DTYPES: Mapping[str, torch.dtype] = {
    str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)
}
MAX_EXPANDED_NUMEL = 1 << 24
"""A tensor may repeat an element (stride 0), but may have at most this many more elements than its storage: a few
bytes must not claim gigabytes.
"""


class Rebuilder:
    """Converts the `Stand` objects of one archive; objects that are shared in the file are shared in the result."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._storages: dict[tuple[str, torch.dtype], Tensor] = {}
        self._made: dict[int, Any] = {}
        self._kept: list[Any] = []
        """Keeps the objects whose ids are keys of `_made` alive: an id is unique only while its object exists."""

    def rebuild(self, value: Any) -> Any:
        """Returns `value` with every known `Stand` converted. Others stay, with their contents converted."""
        if id(value) in self._made:
            return self._made[id(value)]
        if isinstance(value, dict):
            made: Any = self._remember(value, {})
            made.update({_key(self.rebuild(k)): self.rebuild(v) for k, v in value.items()})
        elif isinstance(value, list):
            made = self._remember(value, [])
            made.extend(self.rebuild(v) for v in value)
        elif isinstance(value, tuple):
            made = self._remember(value, tuple(self.rebuild(v) for v in value))
        elif isinstance(value, (set, frozenset)):
            made = self._remember(value, type(value)(_key(self.rebuild(v)) for v in value))
        elif isinstance(value, Stand):
            made = self._stand(value)
        else:
            return value
        return made

    def _remember(self, value: Any, made: Any) -> Any:
        self._made[id(value)] = made
        self._kept.append(value)
        return made

    def _stand(self, value: Stand) -> Any:
        if not value.called:
            return self._remember(value, _DTYPES.get(value.cls, value))
        if value.cls == "collections.OrderedDict":
            ordered = self._remember(value, OrderedDict[Any, Any]())
            pairs = [*(tuple(pair) for pair in (value.args[0] if value.args else ())), *value.pairs]
            ordered.update((_key(self.rebuild(k)), self.rebuild(v)) for k, v in pairs)
            return ordered
        make = _MAKERS.get(value.cls)
        if make is not None:
            return self._remember(value, make(self, value))
        self._remember(value, value)
        value.args = tuple(self.rebuild(v) for v in value.args)
        value.state = {_key(self.rebuild(k)): self.rebuild(v) for k, v in value.state.items()}
        value.items = [self.rebuild(v) for v in value.items]
        value.pairs = [(self.rebuild(k), self.rebuild(v)) for k, v in value.pairs]
        return value

    def tensor(self, value: Stand, dtype: torch.dtype | None = None) -> Tensor:
        """`torch._utils._rebuild_tensor_v2(storage, offset, size, stride, ...)`."""
        storage, offset, size, stride = value.args[:4]
        base = self._storage(storage, dtype)
        size, stride = _whole_numbers(self._sizes(size)), _whole_numbers(self._sizes(stride))
        (offset,) = _whole_numbers((offset,))
        if len(size) != len(stride):
            raise CheckpointError(
                f"{self._archive.path} is damaged: a tensor has {len(size)} sizes and {len(stride)} strides"
            )
        numel = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if numel else -1
        if last >= base.numel() or numel > base.numel() + MAX_EXPANDED_NUMEL:
            raise CheckpointError(
                f"{self._archive.path} is damaged: a tensor of size {list(size)} does not lie inside its storage of "
                f"{base.numel()} elements"
            )
        return base.as_strided(size, stride, offset) if numel else base.new_empty(size)

    def _sizes(self, value: Any) -> Any:
        if isinstance(value, Stand) and value.cls == "torch.Size" and value.args:
            return value.args[0]
        return value

    def _storage(self, stand: Any, dtype: torch.dtype | None) -> Tensor:
        if not isinstance(stand, Stand) or stand.cls != "storage" or len(stand.args) != 5:
            raise CheckpointError(f"{self._archive.path} is damaged: a tensor has no storage")
        kind, storage_class, key, _, numel = stand.args
        stored = _STORAGES.get(storage_class.cls) if isinstance(storage_class, Stand) else None
        if kind != "storage" or stored is None or not isinstance(key, str):
            raise CheckpointError(
                f"{self._archive.path} is damaged: a tensor has a storage of kind {storage_class}"
            )
        (count,) = _whole_numbers((numel,))
        wanted = dtype or stored
        count = count * stored.itemsize // wanted.itemsize if dtype is not None else count
        if (key, wanted) not in self._storages:
            self._storages[key, wanted] = self._archive.storage(key, wanted, count)
        return self._storages[key, wanted]

    def retyped(self, value: Stand) -> Tensor:
        """`torch._utils._rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, ...)`."""
        dtype = self.rebuild(value.args[6])
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"{self._archive.path} is damaged: a tensor has the dtype {dtype}")
        return self.tensor(value, dtype)

    def first_argument(self, value: Stand) -> Any:
        """Returns the tensor of a parameter."""
        return self.rebuild(value.args[0])

    def of_any_type(self, value: Stand) -> Any:
        """`torch._tensor._rebuild_from_type_v2(function, type, args, state)`: a tensor with attributes, or of a
        subclass, becomes a plain tensor.
        """
        function, _, args, *_ = value.args
        inner = Stand(function.cls)
        inner.called, inner.args = True, tuple(args)
        self._kept.append(inner)
        return self.rebuild(inner)

    def container(self, value: Stand) -> Any:
        """Converts a set, a size, bytes and the like, from the first argument."""
        kind = value.cls.rpartition(".")[2]
        items = self.rebuild(value.args[0]) if value.args else ()
        if kind == "Size":
            return torch.Size(_whole_numbers(items))
        if kind in ("bytearray", "encode"):  # protocol 2 stores bytes as latin-1 text
            raw = items.encode("latin-1") if isinstance(items, str) else items or b""
            return bytearray(raw) if kind == "bytearray" and isinstance(raw, bytes) else bytes(raw)
        return (set if kind == "set" else frozenset)(map(_key, [*items, *map(self.rebuild, value.items)]))

    def number(self, value: Stand) -> Any:
        """Converts a complex number or a slice."""
        args = [self.rebuild(v) for v in value.args]
        return complex(*args) if value.cls.endswith("complex") else slice(*args)

    def device(self, value: Stand) -> torch.device:
        """Converts a device."""
        return torch.device(*value.args)


def _key(value: Any) -> Any:
    if isinstance(value, (Tensor, dict, list, set)):
        raise CheckpointError(f"a {type(value).__name__} is the key of a dict: the file is damaged")
    return value


def _whole_numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(type(v) is int and 0 <= v < 2**63 for v in values):
        raise CheckpointError(f"{values!r:.80} are no sizes: the file is damaged")
    return values


_MAKERS: Mapping[str, Callable[[Rebuilder, Stand], Any]] = {
    "torch._utils._rebuild_tensor_v2": Rebuilder.tensor,
    "torch._utils._rebuild_tensor_v3": Rebuilder.retyped,
    "torch._utils._rebuild_parameter": Rebuilder.first_argument,
    "torch._utils._rebuild_parameter_with_state": Rebuilder.first_argument,
    "torch._tensor._rebuild_from_type_v2": Rebuilder.of_any_type,
    "torch.Size": Rebuilder.container,
    "_codecs.encode": Rebuilder.container,
    "torch.device": Rebuilder.device,
    **{
        f"{module}.{name}": make
        for module in ("builtins", "__builtin__")
        for name, make in (
            ("set", Rebuilder.container),
            ("frozenset", Rebuilder.container),
            ("bytearray", Rebuilder.container),
            ("complex", Rebuilder.number),
            ("slice", Rebuilder.number),
        )
    },
}
"""Functions and classes whose results are converted."""
