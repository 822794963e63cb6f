"""Deferred construction: records initialisation on the meta device, and replays it tensor by tensor in `shard`.

[Note: deferred construction]
Inside `deferred_init` every new tensor is a meta tensor, and every operation that writes to one is recorded. A random
operation is also run once on a scratch tensor of the same shape. This advances the generator exactly as ordinary
construction does; the state of the generator before the operation is recorded. So the values of any tensor can be
computed later, in any order and any number of times, with the same bits as by ordinary construction: the record is
searched backwards for the operations on which the tensor depends, which are then run in order. Views need no record: a
tensor is a storage with an offset, sizes and strides, and the replay computes storages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from ds_zero import _registry
from ds_zero.params.deferred_values import swap


@dataclass(frozen=True)
class _Ref:
    """A recorded tensor: its storage, and its view of it."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _Node:
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: frozenset[int]
    writes: frozenset[int]
    """Storages changed in place."""
    makes: tuple[int | None, ...]
    """Storage of each tensor output if it is new, in the order of the flattened outputs."""
    rng_state: Tensor | None


class Record(TorchDispatchMode):
    """Records the operations on all tensors that are constructed under `deferred_init`, and replays them."""

    def __init__(self, stage: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stage = stage
        self._nodes: list[_Node] = []
        self._storages: dict[int, torch.UntypedStorage] = {}

    # --- recording

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten._local_scalar_dense.default and self._knows(args[0]):
            return self.values(args[0]).item()
        if (
            "device" in kwargs and (kwargs["device"] is None or torch.device(kwargs["device"]).type != "meta")
        ) or (
            "device" in {a.name for a in func._schema.arguments}
            and not any(self._knows(a) for a in tree_flatten(args)[0])
        ):
            kwargs["device"] = torch.device("meta")
        flat = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        touches = any(self._knows(t) for t in flat) or kwargs.get("device") == torch.device("meta")
        if not touches:
            return func(*args, **kwargs)
        rng_state = (
            self._advance(func, args, kwargs) if torch.Tag.nondeterministic_seeded in func.tags else None
        )
        # Real tensors (made from Python data) are replaced by meta tensors here; the record keeps their values.
        result = func(*_on_meta(args), **_on_meta(kwargs))
        self._write_down(func, args, kwargs, result, rng_state)
        return result

    def _knows(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.device.type == "meta" and _key(value) in self._storages

    def _advance(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Runs a random operation on scratch tensors, to advance the generator. Returns the state before that."""
        state = torch.get_rng_state()

        def scratch(t: Tensor) -> Tensor:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")

        real_kwargs = {k: (torch.device("cpu") if k == "device" else v) for k, v in kwargs.items()}
        func(*tree_map_only(Tensor, scratch, args), **tree_map_only(Tensor, scratch, real_kwargs))
        return state

    def _write_down(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, rng_state: Tensor | None
    ) -> None:
        outputs = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        makes: list[int | None] = []
        for tensor in outputs:
            new = _key(tensor) not in self._storages
            if new:
                self._storages[_key(tensor)] = tensor.untyped_storage()
            makes.append(_key(tensor) if new else None)
        writes = frozenset(_key(t) for t in _mutated(func, args, kwargs) if self._knows(t))
        if not writes and not any(m is not None for m in makes):
            return  # a view
        reads = frozenset(_key(t) for t in tree_flatten((args, kwargs))[0] if self._knows(t))
        self._nodes.append(
            _Node(func, self._freeze(args), self._freeze(kwargs), reads, writes, tuple(makes), rng_state)
        )

    def _freeze(self, tree: Any) -> Any:
        def one(t: Tensor) -> Any:
            if self._knows(t):
                return _Ref(_key(t), t.dtype, tuple(t.shape), tuple(t.stride()), int(t.storage_offset()))
            return t.detach().clone()  # it might be written later

        return tree_map_only(Tensor, one, tree)

    # --- replay

    def place(self, tensor: Tensor) -> int:
        """Returns the index of the tensor's storage in the order of construction."""
        key = _key(tensor)
        return next((i for i, storage in enumerate(self._storages) if storage == key), -1)

    def hides(self, tensor: Tensor) -> bool:
        """Whether the tensor is still a meta tensor."""
        return tensor.is_meta

    def own(self, tensor: Tensor) -> Tensor | None:
        """Returns None, since there are no slices before `shard`."""
        return None

    def values(self, tensor: Tensor) -> Tensor:
        """Returns the values of `tensor` by ordinary construction, as a new CPU tensor."""
        target = _Ref(
            _key(tensor),
            tensor.dtype,
            tuple(tensor.shape),
            tuple(tensor.stride()),
            int(tensor.storage_offset()),
        )
        if target.storage not in self._storages:
            raise ValueError(
                "a meta tensor that was not constructed under ds_zero.deferred_init has no values: construct "
                "the whole model there"
            )
        needed, wanted = [], {target.storage}
        for node in reversed(self._nodes):
            if wanted & (node.writes | {m for m in node.makes if m is not None}):
                needed.append(node)
                wanted |= node.reads
        real: dict[int, torch.UntypedStorage] = {}
        before = torch.get_rng_state()
        with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
            for node in reversed(needed):
                self._run(node, real)
            torch.set_rng_state(before)
            return _look(target, real).clone()

    def _run(self, node: _Node, real: dict[int, torch.UntypedStorage]) -> None:
        if node.rng_state is not None:
            torch.set_rng_state(node.rng_state)
        args, kwargs = tree_map_only(_Ref, lambda r: _look(r, real), (node.args, node.kwargs))
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        result = node.func(*args, **kwargs)
        outputs = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        for made, tensor in zip(node.makes, outputs, strict=True):
            if made is not None:
                real[made] = tensor.untyped_storage()


class _Ordinary(TorchFunctionMode):
    """Makes `is_meta` false for recorded tensors, because several functions of `torch.nn.init` do nothing for meta
    tensors.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == _is_meta:  # a method-wrapper is a new object each time
            return False
        return func(*args, **(kwargs or {}))


_is_meta = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _look(ref: _Ref, real: dict[int, torch.UntypedStorage]) -> Tensor:
    return torch.empty(0, dtype=ref.dtype).set_(real[ref.storage], ref.offset, ref.size, ref.stride)


def _on_meta(tree: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t if t.device.type == "meta" else t.to("meta"), tree)


def _mutated(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    mutated: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            mutated += [t for t in tree_flatten(value)[0] if isinstance(t, Tensor)]
    return mutated


@contextlib.contextmanager
def deferred_init(stage: int | None = None, *, defer_buffers: bool = True) -> Iterator[None]:
    """Context manager in which modules are constructed without memory for their values. `shard` then creates each
    rank's values, one bucket at a time.

    The weights are bitwise those of ordinary construction from the same seed, however modules initialise themselves,
    and the random generator ends in the same state. Construction takes about as long as without this context, and
    `shard` takes that long again.

    Args:
        stage: the stage of the later call of `shard`. If given, `shard` raises for another stage.
        defer_buffers: False creates the values of buffers at the end of the context, for code that writes them before
            `shard`.

    Raises:
        ValueError: in `shard`, for meta tensors that were constructed outside of the context.
    """
    record = Record(stage)
    owners: dict[int, nn.Module] = {}

    def note(module: nn.Module, _: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.device.type == "meta":
            _registry.put_record(value, record)
            if not defer_buffers and not isinstance(value, nn.Parameter):
                owners[id(module)] = module

    handles = [
        nn_module.register_module_parameter_registration_hook(note),
        nn_module.register_module_buffer_registration_hook(note),
    ]
    try:
        with record, _Ordinary():
            yield
    finally:
        for handle in handles:
            handle.remove()
    for module in owners.values():
        _materialize_own(module, torch.get_default_device())


def materialize_buffers(model: nn.Module, device: torch.device) -> None:
    """Replaces every deferred buffer by a tensor with its values."""
    for module in model.modules():
        _materialize_own(module, device)


def _materialize_own(module: nn.Module, device: torch.device) -> None:
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.device.type == "meta":
            persistent = name not in module._non_persistent_buffers_set
            module.register_buffer(name, _values_of(name, buffer).to(device), persistent=persistent)


def recorded_values(params: Mapping[str, nn.Parameter]) -> Callable[[str, nn.Parameter], Tensor]:
    """Returns a function from a parameter to its initial values: its own, or those of its record."""

    def values(fqn: str, param: nn.Parameter) -> Tensor:
        waits = param.device.type == "meta" or _registry.find_record(param) is not None
        return _values_of(fqn, param) if waits else param.data

    return values


def become_real(param: nn.Parameter, device: torch.device) -> None:
    """Turns a parameter of `deferred_init` or `divided_init` into one on `device` without memory of its own; the object
    and its shape stay the same.
    """
    has_record = _registry.find_record(param) is not None
    _registry.drop_record(param)  # a tensor with weak references cannot be swapped
    if not has_record and param.device.type != "meta":
        return
    stand_in = torch.empty(1, dtype=param.dtype, device=device).expand(param.shape)
    if param.device.type != "meta":
        param.data = stand_in
        return
    swap(param, nn.Parameter(stand_in, requires_grad=param.requires_grad))


def stage_expected(params: Mapping[str, nn.Parameter]) -> int | None:
    """The stage given to `deferred_init`, if these parameters come from one."""
    for param in params.values():
        record = _registry.find_record(param)
        if record is not None:
            return record.stage
    return None


def _values_of(name: str, tensor: Tensor) -> Tensor:
    record = _registry.find_record(tensor)
    if record is None:
        raise ValueError(
            f"{name!r} is a meta tensor without recorded values: construct the model inside `with "
            "ds_zero.deferred_init():`, or "
            "give it values with model.to_empty(...) and a checkpoint"
        )
    return record.values(tensor)
