"""Detects external parameters: those that are read outside their module's forward, as in
`F.linear(x, self.embed.weight)`.

[Note: external parameters]
If a module reads a parameter of another module, no hook gathers that parameter. Two mechanisms detect this.

In the first forward of each mode (training or evaluation, with or without gradients), all operations are intercepted
(`ExternalReads`, `ExternalOperands`). A parameter whose values an operation reads outside its module's forward is
gathered at once. From then on the model as a whole gathers it: from the beginning to the end of the model's forward,
and again during backward.

In all forwards, the modules' `_parameters` dictionaries report when a parameter is read from them by name
(`WatchedParameters`, about 0.2 us per read). This detects parameters that only a later forward reads, in another
branch; such a parameter is gathered for that forward. Parameters of which the first forward read only the dtype, device
or shape are ignored here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_VALUES = frozenset(["data", "T", "mT", "H", "mH", "real", "imag"])
"""Properties of a tensor that are views of its elements; all others are metadata."""

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
"""Functions that do not read the elements of a parameter that is passed to them."""


class ExternalReads(TorchFunctionMode):
    """While active, calls `read` with every parameter whose elements a torch function is about to read."""

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


class ExternalOperands(TorchDispatchMode):
    """The same below autograd, for forwards without gradients. In those, torch's modules use fused implementations,
    which round differently, but not if a function mode such as `ExternalReads` is active.
    """

    def __init__(self, read: Callable[[nn.Parameter], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._read = read

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, nn.Parameter):
                self._read(value)
        return func(*args, **(kwargs or {}))


def _reads(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in _VALUES
    return name not in _ABOUT


class Listener(Protocol):
    """Is called when a parameter is read from its module's dictionary, or replaced there."""

    listening: bool
    """Whether reads are reported; true while a forward is running."""

    def on_read(self, param: Tensor) -> None: ...

    def on_replaced(self, name: str, value: object) -> None: ...


class WatchedParameters(dict[str, Any]):
    """A module's `_parameters` dictionary that reports reads and replacements to `listener`.

    A copy of it, or of the module, has an ordinary dictionary.
    """

    def __init__(self, params: Mapping[str, Any], listener: weakref.ref[Listener]) -> None:
        super().__init__(params)
        self._listener = listener

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        listener = self._listener()
        if listener is not None and listener.listening and value is not None:
            listener.on_read(value)
        return value

    def __setitem__(self, name: str, value: Any) -> None:
        listener = self._listener()
        if listener is not None:
            listener.on_replaced(name, value)
        super().__setitem__(name, value)

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return dict, (dict(self),)


class ParameterReadHook:
    """Installs `WatchedParameters` in a module, as if by a hook; `remove` restores the ordinary dictionary."""

    def __init__(self, module: nn.Module, listener: weakref.ref[Listener]) -> None:
        self._module = weakref.ref(module)
        # torch has no hook for reads of parameters, but every read by name uses this dictionary.
        vars(module)["_parameters"] = WatchedParameters(module._parameters, listener)

    def remove(self) -> None:
        module = self._module()
        if module is not None and isinstance(module._parameters, WatchedParameters):
            vars(module)["_parameters"] = dict(module._parameters)


def tensors_in(value: object, depth: int = 4) -> list[Tensor]:
    """Returns the tensors in nested lists, tuples, dicts and attributes of objects, such as dataclasses that are not
    registered as pytree nodes.
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
