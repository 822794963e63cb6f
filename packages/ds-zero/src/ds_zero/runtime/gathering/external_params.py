"""Finds parameters that are read outside their module's forward, as in `F.linear(x, self.embed.weight)`.

[Note: read outside]
A parameter that another module reads has no hook of its own. Two means find it. The first forward in each mode
watches all operations (`OutsideReads`, `OutsideOperands`): a parameter found there is gathered when it is first
read, and from then on the model itself holds it, from the beginning of its forward to the end, and again while backward
runs. And modules keep their parameters in a dictionary that tells when one is taken out during a forward
(`Told`, some 0.2 us a read): it finds what a later branch reads, and gathers it for that forward. A parameter
of which the watched forward only asked the dtype, the device or the shape is left alone by the second.
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


class OutsideOperands(TorchDispatchMode):
    """The same below autograd, for forwards without gradients: torch's modules take other (fused) ways where no
    function mode is active, which round differently.
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
    """Who is told when a parameter is taken out of its module, or replaced."""

    telling: bool
    """Whether a forward is running, so that it wants to know."""

    def taken(self, param: Tensor) -> None: ...

    def replaced(self, name: str, value: object) -> None: ...


class Told(dict[str, Any]):
    """A module's own dictionary of parameters, which tells `listener` when one is taken out by name.

    A copy of it, or of the module, is an ordinary dictionary.
    """

    def __init__(self, params: Mapping[str, Any], listener: weakref.ref[Listener]) -> None:
        super().__init__(params)
        self._listener = listener

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        listener = self._listener()
        if listener is not None and listener.telling and value is not None:
            listener.taken(value)
        return value

    def __setitem__(self, name: str, value: Any) -> None:
        listener = self._listener()
        if listener is not None:
            listener.replaced(name, value)
        super().__setitem__(name, value)

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return dict, (dict(self),)


class Telling:
    """A module whose parameters tell; `remove` makes it an ordinary one again."""

    def __init__(self, module: nn.Module, listener: weakref.ref[Listener]) -> None:
        self._module = weakref.ref(module)
        # torch has no hook for this; the dictionary is the one place through which every read by name goes.
        vars(module)["_parameters"] = Told(module._parameters, listener)

    def remove(self) -> None:
        module = self._module()
        if module is not None and isinstance(module._parameters, Told):
            vars(module)["_parameters"] = dict(module._parameters)


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
