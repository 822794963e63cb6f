"""Tracks every storage that fake tensors would have allocated: purpose, device, and the peak of all storages."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

PARAMETERS, MASTERS, GRADIENTS, STATES = "parameters", "masters", "gradients", "states"
BUCKETS, GATHERED, ACTIVATIONS, BUFFERS, WORKSPACE = (
    "buckets",
    "gathered",
    "activations",
    "buffers",
    "workspace",
)
PURPOSES = (
    PARAMETERS,
    MASTERS,
    GRADIENTS,
    STATES,
    BUCKETS,
    GATHERED,
    ACTIVATIONS,
    BUFFERS,
    WORKSPACE,
)

_TRANSPARENT = frozenset(["ds_zero.predict.allocation_tracker", "ds_zero.runtime.gathering.external_params"])
"""Modules whose stack frames are skipped to find the code that allocated a tensor."""

_MADE_BY: Mapping[str, str] = {
    "ds_zero.runtime.bucket": PARAMETERS,
    "ds_zero.predict.model_copy": PARAMETERS,
    "ds_zero.runtime.gradients.norms": WORKSPACE,
    "ds_zero.predict.optimizer_probe": STATES,
    "ds_zero.runtime.gathering.secondary": PARAMETERS,
    "ds_zero.predict.simulate": "",
    "ds_zero.params.stores": MASTERS,
}
"""Module -> the purpose of tensors that it creates; "" stands for the purpose given by the phase. Tensors that other
modules of this package create are buckets."""


_ITEM = torch.ops.aten._local_scalar_dense.default

Operations = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


def torchs_own(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Handles no operation: torch runs all of them."""
    return NotImplemented


class Peak:
    """The largest sum so far, and its parts."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.parts: dict[str, int] = {}

    def offer(self, num_bytes: int, parts: Callable[[], dict[str, int]]) -> None:
        """Records a sum; `parts` is called only if it is a new maximum."""
        if num_bytes > self.num_bytes or not self.parts:
            self.num_bytes, self.parts = num_bytes, parts()


class PhasePeaks:
    """Maxima of one phase: of the device, of the host, and of both together."""

    def __init__(self) -> None:
        self.device, self.host, self.both = Peak(), Peak(), Peak()

    def add(self, purpose: str, num_bytes: int) -> None:
        """Adds bytes on the device that were not tracked."""
        for peak in (self.device, self.both):
            peak.num_bytes += num_bytes
            peak.parts[purpose] += num_bytes


class Ledger(TorchDispatchMode):
    """Inside `FakeTensorMode`, tracks every storage from the operation that creates it to its last reference.

    Resizing a storage is not an operation that the dispatcher sees, so storages of gathered buckets must be watched:
    `watch`. The purpose of a storage is derived from the code that allocated it, unless `classify` sets it.

    Args:
        granule_bytes: the device's allocator rounds up to multiples of this (512 on accelerators, 1 on the CPU).
        operations: runs an operation, or returns NotImplemented, so that torch runs it.
        resizes: whether buckets are resized, so that new ones must be watched.
    """

    def __init__(
        self, granule_bytes: int, operations: Operations = torchs_own, *, resizes: bool = True
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._granule = granule_bytes
        self._operations = operations
        self._resizes = resizes
        self._of: dict[int, tuple[str, bool, int]] = {}
        """Storage -> purpose, whether on the host, bytes."""
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._device: dict[str, int] = dict.fromkeys(PURPOSES, 0)
        self._host: dict[str, int] = dict.fromkeys(PURPOSES, 0)
        self._device_sum = self._host_sum = 0
        self._watched: dict[int, torch.UntypedStorage] = {}
        self._filled: set[int] = set()
        """Watched storages that were not empty at the last check."""
        self._sizes: dict[int, int] = {}
        """Bytes of the watched storages at the last check."""
        self.phases: dict[str, PhasePeaks] = {}
        self._now = PhasePeaks()
        self._any_on_host = False
        self._fresh = ACTIVATIONS
        self.guesses: list[str] = []
        """Places where the program needed values, and the assumed answers."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the wrapper costs as much as a lean operation

    # --- what the simulation says

    def phase(self, name: str, fresh: str) -> None:
        """Starts the phase `name`. Storages that the user's code creates have the purpose `fresh`."""
        self._now = self.phases.setdefault(name, PhasePeaks())
        self._fresh = fresh
        self._note()

    def watch(self, tensors: Sequence[Tensor]) -> None:
        """From now on tracks the sizes of these tensors' storages, which are gathered parameters."""
        self._watched.clear()
        self._filled.clear()
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._watched[storage._cdata] = storage
            self._sizes.pop(storage._cdata, None)
            self._filled.add(storage._cdata)
        self.classify(tensors, GATHERED)
        self._look_at_watched(())

    def classify(
        self, tensors: Sequence[Tensor | None], purpose: str, *, on_host: bool | None = None
    ) -> None:
        """Sets the purpose of these tensors' storages. `on_host` says whether they are in host memory, if that does not
        follow from their device.
        """
        for tensor in tensors:
            if tensor is None:
                continue
            key = tensor.untyped_storage()._cdata
            if key in self._of:
                _, was_host, num_bytes = self._of[key]
                self._add(key, -num_bytes)
                self._of[key] = (purpose, was_host if on_host is None else on_host, num_bytes)
                self._add(key, num_bytes)
                self._any_on_host = self._any_on_host or on_host is True

    def purpose(self, tensor: Tensor) -> tuple[str, bool] | None:
        """Returns the purpose of the storage, and whether it is on the host; None if unknown."""
        entry = self._of.get(tensor.untyped_storage()._cdata)
        return entry[:2] if entry is not None else None

    def held(self) -> dict[str, int]:
        """Returns the current bytes on the device by purpose."""
        return dict(self._device)

    # --- following operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # half of all calls, none of which allocates memory
            return args[0].fake_device
        if func is _ITEM and getattr(args[0], "constant", None) is None:
            result = self._guess(func, args)
        else:
            result = self._operations(func, args, kwargs or {})
        if result is NotImplemented:
            try:
                result = func(*args, **(kwargs or {}))
            except (DataDependentOutputException, DynamicOutputShapeException):
                result = self._guess(func, args)
        if isinstance(result, Tensor):
            self._see(result, args, kwargs)
        elif isinstance(result, (tuple, list)):
            for value in tree_iter(result):
                if isinstance(value, Tensor):
                    self._see(value, args, kwargs)
        if self._watched:
            self._look_at_watched(args)
        self._note()
        return result

    def _see(self, tensor: Tensor, args: Any, kwargs: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._of:
            return
        frame = sys._getframe(2)
        # The result of an operation on host memory is on the host.
        on_host = self._any_on_host and any(
            self._of.get(t.untyped_storage()._cdata, ("", False))[1]
            for t in tree_iter((args, kwargs))
            if isinstance(t, Tensor)
        )
        made_by, purpose = self._purpose_of(frame)
        self._of[key] = (purpose, on_host, 0)
        if (
            self._resizes and made_by == "ds_zero.runtime.bucket" and tensor.numel() > 1
        ):  # a hole keeps its size
            self._watched[key] = storage
            self._sizes.pop(key, None)
            self._filled.add(key)
        self._alive[key] = weakref.ref(storage, lambda _: self._forget(key))
        self._resize(key, storage.nbytes())

    def _purpose_of(self, frame: FrameType | None) -> tuple[str, str]:
        """Returns the module of this package that allocates ("" for other code), and the purpose of the memory."""
        while frame is not None:
            name: str = frame.f_globals.get("__name__", "")
            if name.startswith("ds_zero.") and name not in _TRANSPARENT:
                return name, _MADE_BY.get(name, BUCKETS) or self._fresh
            if name.startswith("torch.optim"):
                return "", STATES if frame.f_code.co_name == "_init_group" else WORKSPACE
            frame = frame.f_back
        return "", self._fresh

    def _resize(self, key: int, num_bytes: int) -> None:
        purpose, on_host, old = self._of[key]
        size = num_bytes if on_host else -(-num_bytes // self._granule) * self._granule
        if size != old:
            self._of[key] = (purpose, on_host, size)
            self._add(key, size - old)

    def _add(self, key: int, num_bytes: int) -> None:
        purpose, on_host, _ = self._of[key]
        if on_host:
            self._host[purpose] += num_bytes
            self._host_sum += num_bytes
        else:
            self._device[purpose] += num_bytes
            self._device_sum += num_bytes

    def _forget(self, key: int) -> None:
        self._add(key, -self._of[key][2])
        del self._of[key], self._alive[key]

    def _look_at_watched(self, args: tuple[Any, ...]) -> None:
        """Updates the sizes of watched storages: of those that had memory, which may have been freed, and of those
        among `args`, which may have been allocated.
        """
        for value in args:
            if isinstance(value, Tensor):
                key = value.untyped_storage()._cdata
                if key in self._watched:
                    self._filled.add(key)
        for key in list(self._filled):
            num_bytes = self._watched[key].nbytes()
            if num_bytes != self._sizes.get(key):
                self._sizes[key] = num_bytes
                self._resize(key, num_bytes)
            if not num_bytes:
                self._filled.discard(key)

    def _note(self) -> None:
        now, device, host = self._now, self._device_sum, self._host_sum
        now.device.offer(device, lambda: dict(self._device))
        now.host.offer(host, lambda: dict(self._host))
        now.both.offer(device + host, lambda: {p: self._device[p] + self._host[p] for p in PURPOSES})

    # --- values, which fake tensors do not have

    def _guess(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Returns an answer with which the program continues: all elements for a selection, False for a condition."""
        where = _asked_by()
        if func is _ITEM:
            dtype = args[0].dtype
            answer: Any = False if dtype == torch.bool else 1
            if dtype.is_floating_point:  # this package checks whether sums are finite
                answer = math.nan if where else 1.0
            if where:
                self.guesses.append(f"{where} reads a value; assumed: {answer}")
            return answer
        if func is torch.ops.aten.nonzero.default:
            self.guesses.append(f"{where} reads the indices of nonzero elements; assumed: all elements")
            return torch.zeros(args[0].numel(), args[0].ndim, dtype=torch.int64, device=args[0].device)
        if func is torch.ops.aten.masked_select.default:
            self.guesses.append(f"{where} selects by a mask; assumed: all elements")
            return args[0].new_zeros(math.prod(torch.broadcast_shapes(args[0].shape, args[1].shape)))
        raise ValueError(
            f"plan: {where or 'the model'} uses {func}, the shape of whose result depends on values, which a "
            "plan does not have: pass micro_batch=None to plan only the model's states"
        )


def _asked_by() -> str:
    """Returns file and line of the innermost code outside of torch and this package; empty if this package caused the
    operation.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name: str = frame.f_globals.get("__name__", "")
        if name.startswith("ds_zero.") and name not in _TRANSPARENT:
            return ""
        if name.partition(".")[0] not in ("torch", "ds_zero"):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
