"""Fast operations on fake tensors.

[Note: fast fake operations]
Torch's fake tensors are designed for tracing: every operation handles constants, symbolic sizes, other modes and a
cache, which takes about 0.3 ms. The operations that make up nearly all of a training step need none of that: the result
is that of torch's meta kernel, on the storage of the operand if it is a view. So this module calls the meta kernel and
wraps its result. If operands with the same shapes, strides and dtypes have occurred before, it constructs the result
without the kernel. All other operations are run by torch's fake tensors. `tests/zero/predict/test_fake_ops.py` compares
the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_CPU, _META = torch.device("cpu"), torch.device("meta")

_VIEWS = """alias as_strided detach diagonal expand permute select.int slice.Tensor split.Tensor split_with_sizes
squeeze squeeze.dim t transpose.int unbind.int unsqueeze view view.dtype _unsafe_view"""

_IN_PLACE = """copy_ fill_.Scalar zero_ add_.Tensor div_.Scalar div_.Tensor mul_.Scalar mul_.Tensor addcdiv_ addcmul_
lerp_.Scalar sqrt_"""

_MAKERS = "empty.memory_format empty_strided full ones zeros"

# None whose result is another on the CPU than on the meta device (statistics of layer_norm, attention).
_FRESH = """empty_like full_like new_empty new_empty_strided new_zeros ones_like zeros_like
clone _to_copy add.Scalar add.Tensor div.Scalar div.Tensor mul.Scalar mul.Tensor neg pow.Scalar
pow.Tensor_Scalar rsub.Scalar sub.Scalar sub.Tensor
addcdiv addcmul lerp.Scalar maximum minimum
cos erf exp gelu log relu rsqrt sigmoid silu sin sqrt tanh
gelu_backward sigmoid_backward silu_backward tanh_backward threshold_backward
masked_fill.Scalar where.self eq.Scalar ge.Scalar gt.Scalar le.Tensor logical_not lt.Scalar ne.Scalar
_log_softmax _log_softmax_backward_data _softmax _softmax_backward_data mean mean.dim sum sum.dim_IntList
cat select_backward slice_backward stack
addmm baddbmm bmm dot mm
nll_loss_backward nll_loss_forward embedding_dense_backward"""


_UNKNOWN = ()


def _overloads(names: str) -> frozenset[Any]:
    operations = set()
    for name in names.split():
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
        if operation is not None:  # not every torch has all
            operations.add(operation)
    return frozenset(operations)


class LeanOperations:
    """Runs supported operations on fake CPU tensors.

    Args:
        mode: the active mode, to which all tensors belong.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._makers = _overloads(_MAKERS)
        self._fresh = _overloads(_FRESH)
        self._known = _overloads(f"{_VIEWS} {_IN_PLACE}") | self._fresh | self._makers
        profiler = torch.ops.profiler
        self._marks = {
            profiler._record_function_enter_new.default,
            profiler._record_function_exit._RecordFunction,
        }
        self._attributes: dict[str, Any] | None = None
        self._results: dict[Any, tuple[Any, ...] | None] = {}
        """Operation and operands -> what it makes; None for what has to be asked for each time."""

    def __call__(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The result, or NotImplemented where torch has to find it."""
        if func in self._marks:  # of the profiler: no tensors
            with torch._C._DisableTorchDispatch():
                return func(*args, **kwargs)
        if func not in self._known:
            return NotImplemented
        key: list[Any] = [func]
        tensors = self._describe(args, key)
        if tensors is None or (not tensors and func not in self._makers):
            return NotImplemented
        if kwargs or func in self._makers:
            device = kwargs.get("device", _CPU)
            if (device is not None and device.type != "cpu") or kwargs.get("pin_memory"):
                return NotImplemented
            if any(isinstance(v, Tensor) for v in kwargs.values()):
                return NotImplemented
            kwargs = {**kwargs, "device": _META} if func in self._makers or "device" in kwargs else kwargs
            key += kwargs.items()
        if func not in self._fresh:
            return self._wrap(self._on_meta(func, args, kwargs))
        return self._again(tuple(key), func, args, kwargs)

    def _again(self, key: Any, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The result of an operation whose results share no memory with anything."""
        try:
            known = self._results.get(key, _UNKNOWN)
        except TypeError:  # an argument that has no hash
            known, key = None, None
        if known is _UNKNOWN or known is None:
            result = self._on_meta(func, args, kwargs)
            if known is _UNKNOWN and isinstance(result, Tensor):
                self._results[key] = (result.shape, result.stride(), result.dtype)
            elif known is _UNKNOWN:
                self._results[key] = None
            return self._wrap(result)
        return self._wrap(self._on_meta(torch.empty_strided, known[:2], {"dtype": known[2], "device": _META}))

    def _on_meta(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The meta kernel's own result: fake tensors are meta tensors here, as in torch's
        `in_kernel_invocation_manager`.
        """
        with torch._C._DisableTorchDispatch():
            self._mode.in_kernel_invocation = True
            with torch._C._PreserveDispatchKeyGuard():
                torch._C._set_meta_in_tls_dispatch_include(True)
                try:
                    return func(*args, **kwargs)
                finally:
                    self._mode.in_kernel_invocation = False

    def _wrap(self, result: Any) -> Any:
        if isinstance(result, FakeTensor):  # an operation in place
            return result
        if isinstance(result, Tensor):
            return self._fake(result)
        if isinstance(result, (tuple, list)):
            return type(result)(self._wrap(part) for part in result)
        return result

    def _fake(self, meta: Tensor) -> Tensor:
        """Returns `FakeTensor(mode, meta, cpu)`, with the attributes of the first one, since they are always equal."""
        if self._attributes is None:
            first = FakeTensor(self._mode, meta, _CPU)
            self._attributes = dict(vars(first))
            return first
        made: Tensor = Tensor._make_subclass(
            FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=_CPU
        )
        torch._C._set_throw_on_mutable_data_ptr(made)
        vars(made).update(self._attributes)
        return made

    def _describe(self, args: Sequence[Any], key: list[Any]) -> int | None:
        """Appends everything on which the result depends to `key`. Returns the number of tensors; None if one of them
        is not fake, or has a value that torch tracks.
        """
        count = 0
        for value in args:
            if isinstance(value, Tensor):
                if type(value) is not FakeTensor or value.constant is not None or value.fake_device != _CPU:
                    return None
                count += 1
                key += (value.shape, value.stride(), value.dtype)
            elif isinstance(value, (list, tuple)):
                key.append(len(value))
                inner = self._describe(value, key)
                if inner is None:
                    return None
                count += inner
            else:
                key += (type(value), value)
        return count
