"""The options of an optimizer's parameter groups, such as learning rates, in a form that ranks can compare."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ds_zero.comm.agreement import digest
from ds_zero.tensors.storage import is_fake

_COMPARED = (bool, int, float, str, type(None))


class OptimizerOptions:
    """Reads the options of an optimizer's parameter groups. Does not keep the optimizer alive."""

    def __init__(self, optimizer: Optimizer | None = None) -> None:
        self._optimizer = weakref.ref(optimizer) if optimizer is not None else None
        self._last: tuple[list[tuple[str, Any]], int] | None = None
        """The last options and their digest, which is computed again only if options have changed."""

    def follow(self, optimizer: Optimizer) -> None:
        """Reads the options of this optimizer from now on."""
        self._optimizer = weakref.ref(optimizer)

    def described(self) -> dict[str, str]:
        """Returns the options as text: `param_groups[i]['name']` -> `repr` of the value."""
        return {name: repr(value) for name, value in self._items()}

    def digest(self) -> int:
        """Returns a 31-bit hash of the options; 0 without an optimizer."""
        items = list(self._items())
        if self._last is None or self._last[0] != items:
            self._last = items, digest(self.described()) if items else 0
        return self._last[1]

    def _items(self) -> Iterator[tuple[str, Any]]:
        optimizer = self._optimizer() if self._optimizer is not None else None
        for index, group in enumerate(optimizer.param_groups if optimizer is not None else ()):
            for name, value in group.items():
                if name == "params":
                    continue
                if (
                    isinstance(value, Tensor)
                    and value.ndim == 0
                    and value.device.type == "cpu"
                    and not is_fake(value)
                ):
                    yield f"param_groups[{index}][{name!r}]", value.item()
                elif isinstance(value, _COMPARED):
                    yield f"param_groups[{index}][{name!r}]", value
                elif isinstance(value, (tuple, list)) and all(isinstance(v, _COMPARED) for v in value):
                    yield f"param_groups[{index}][{name!r}]", tuple(value)
