"""Finds parameters that are read outside their module's forward, as in `F.linear(x, self.embed.weight)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_VALUES = frozenset(["data", "T", "mT", "H", "mH", "real", "imag"])
"""Properties of a tensor that lead to its elements; all others tell about the tensor."""

_ABOUT = frozenset(
    [
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "stride",
        "storage_offset",
        "element_size",
        "is_floating_point",
        "is_complex",
        "is_contiguous",
        "is_signed",
        "get_device",
        "data_ptr",
        "untyped_storage",
        "register_hook",
        "register_post_accumulate_grad_hook",
        "requires_grad_",
        "__hash__",
        "__len__",
        "__set__",
        "__delete__",
    ]
)
"""Functions that take a parameter without reading its elements."""


class OutsideReads(TorchFunctionMode):
    """While active, calls `read` with every parameter that a torch function is about to take values from."""

    def __init__(self, read: Callable[[nn.Parameter], None]) -> None:
        super().__init__()
        self._read = read

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if _reads(func):
            self._look(args)
            if kwargs:
                self._look(kwargs.values())
        return func(*args, **(kwargs or {}))

    def _look(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, nn.Parameter):
                self._read(value)
            elif isinstance(value, (list, tuple)):
                self._look(value)


def _reads(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in _VALUES
    return name not in _ABOUT


def tensors_in(value: object, depth: int = 4) -> list[Tensor]:
    """The tensors inside lists, tuples, dicts and objects with attributes, such as dataclasses that pytree
    does not know.
    """
    if isinstance(value, Tensor):
        return [value]
    if depth == 0 or isinstance(value, (nn.Module, str, bytes, type)):
        return []
    inner: Iterable[object] = ()
    if isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        inner = value
    elif hasattr(value, "__dict__"):
        inner = vars(value).values()
    else:
        inner = [getattr(value, name, None) for name in getattr(type(value), "__slots__", ())]
    return [tensor for item in inner for tensor in tensors_in(item, depth - 1)]
