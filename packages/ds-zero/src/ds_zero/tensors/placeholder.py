"""Placeholder tensors for values that are not available: they have a shape, a dtype and a device, but no memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

_aten = torch.ops.aten
_CLEARING = (_aten.zero_.default, _aten._foreach_zero_.default)
_SAME = (_aten.detach.default, _aten.detach_.default)

H = TypeVar("H", bound="Placeholder")


class Placeholder(Tensor):
    """A tensor without memory. Shape, dtype and device can be read; it can be assigned, deleted and set to zero.
    Every other use raises a ValueError that says how to get the values.
    """

    _explanation: str

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def like(cls: type[H], tensor: Tensor, explanation: str) -> H:
        """Makes a handle with the shape, dtype and device of `tensor`; errors contain `explanation`."""
        made: H = torch.Tensor._make_wrapper_subclass(
            cls, tensor.shape, dtype=tensor.dtype, device=tensor.device
        )
        made._explanation = explanation
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _SAME:
            return args[0]
        if func in _CLEARING:
            return args[0] if isinstance(args[0], Tensor) else None
        first = next(a for a in _flat((*args, *(kwargs or {}).values())) if isinstance(a, Placeholder))
        return first._answer(func, args)

    def _answer(self, func: Any, args: Sequence[Any]) -> Any:
        """The result of an operation that is not harmless."""
        self._refuse(str(func.overloadpacket).removeprefix("aten."))

    def _refuse(self, operation: str) -> NoReturn:
        raise ValueError(f"{operation}: {self._explanation}")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, no values)"

    # What torch answers without dispatching: an address of 0, which kernels would read, or a file full of nothing.

    def data_ptr(self) -> NoReturn:
        self._refuse("data_ptr")

    def untyped_storage(self) -> NoReturn:
        self._refuse("untyped_storage")

    def is_contiguous(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse("is_contiguous")

    def numpy(self, *, force: bool = False) -> NoReturn:
        self._refuse("numpy")

    def tolist(self) -> NoReturn:
        self._refuse("tolist")

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse("numpy")

    def __dlpack__(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse("__dlpack__")

    def __deepcopy__(self, memo: Any) -> NoReturn:
        self._refuse("deepcopy")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self._refuse("pickle")


def _flat(values: Sequence[Any]) -> list[Any]:
    flat: list[Any] = []
    for value in values:
        flat += value if isinstance(value, (list, tuple)) else [value]
    return flat


class ReducedGradient(Placeholder):
    """`param.grad` after a backward, when the gradient has been taken to be reduced to the optimizer's shards.

    In a backward of which no hook reports the start (of submodules that are called directly), the placeholder may still
    be there when autograd accumulates a gradient. It then stores that gradient.
    """

    _arrived: Tensor | None = None

    @property
    def is_sparse(self) -> NoReturn:  # type: ignore[override]
        """Raises, since torch's optimizers read this attribute of every gradient before they change anything."""
        self._refuse("is_sparse")

    def _answer(self, func: Any, args: Sequence[Any]) -> Any:
        added = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else None
        if torch._C._current_graph_task_id() != -1 and args[0] is self and added is not None:
            if func is _aten.add_.Tensor:
                self._arrived = added.clone()  # others may hold the same tensor
                return self
            if func is _aten.add.Tensor:  # with create_graph
                return added.clone()
        return super()._answer(func, args)

    def take_arrived(self) -> Tensor:
        """Returns the gradient that autograd has added to this handle."""
        arrived, self._arrived = self._arrived, None
        assert arrived is not None, "no gradient has arrived"
        return arrived
