"""The attributes that DeepSpeed adds to ZeRO-3 parameters: `ds_id`, `ds_shape`, `ds_status`, `all_gather()`, ...

The class of a parameter is replaced by a subclass with these properties, which read the state of ds_zero when they are
accessed. So nothing has to be updated, and `hasattr(param, "ds_id")` is true exactly while the parameter is sharded, or
is going to be by `deepspeed.initialize`.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

import ds_zero


class ZeroParamType(enum.Enum):
    """Kind of a parameter; REMOTE for all sharded ones."""

    NORMAL = 1
    PARTITIONED = 2
    REMOTE = 3


class ZeroParamStatus(enum.Enum):
    """Whether a sharded parameter is gathered."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


_numbers = itertools.count()
_open: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Parameter -> the `gathered` context that `param.all_gather()` has opened."""


class Divided:
    """The properties. They raise AttributeError, as for any missing attribute, while the parameter is not sharded."""

    def _look(self) -> ds_zero.Presence:
        if not known(self):
            raise AttributeError("this parameter is not sharded at ZeRO stage 3")
        return ds_zero.presence(self)  # type: ignore[arg-type, return-value]

    @property
    def ds_id(self) -> int:
        if not self._look().divided:  # code gathers a parameter if it has a ds_id
            raise AttributeError("this parameter is small, so every rank keeps it whole")
        return int(vars(self)["_ds_number"])

    @property
    def ds_shape(self) -> torch.Size:
        self._look()
        return self.shape  # type: ignore[attr-defined,no-any-return]

    @property
    def ds_numel(self) -> int:
        self._look()
        return int(self.numel())  # type: ignore[attr-defined]

    @property
    def ds_status(self) -> ZeroParamStatus:
        return ZeroParamStatus.AVAILABLE if self._look().here else ZeroParamStatus.NOT_AVAILABLE

    @property
    def ds_tensor(self) -> Tensor:
        own_slice = self._look().own
        if own_slice is None:
            raise AttributeError("ds_tensor: the parameter has no slice before deepspeed.initialize")
        return own_slice

    @property
    def ds_persist(self) -> bool:
        return self._look().kept

    @property
    def ds_param_type(self) -> ZeroParamType:
        self._look()
        return ZeroParamType.REMOTE

    @property
    def ds_process_group(self) -> Any:
        self._look()
        return torch.distributed.group.WORLD

    @property
    def ds_active_sub_modules(self) -> set[int]:
        """Returns an empty set: modules that use the parameter now are not tracked."""
        return set()

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """Returns an ordinary parameter with the whole value. Collective if the parameter is not gathered.

        PEFT copies a layer for `modules_to_save`, and gathers it before only if its parameters have no elements, as in
        DeepSpeed. A plain copy of a sharded parameter would contain NaN.
        """
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        look = ds_zero.presence(self)  # type: ignore[arg-type]
        hidden = look is not None and not look.here
        with ds_zero.gathered(self) if hidden else contextlib.nullcontext():  # type: ignore[arg-type]
            value = self.data.clone(memory_format=torch.preserve_format)  # type: ignore[attr-defined]
        kind = type(self).__mro__[2]  # below this class and `Divided`
        made: nn.Parameter = kind(value, self.requires_grad)  # type: ignore[attr-defined]
        memo[id(self)] = made
        return made

    def all_gather(
        self, param_list: Sequence[nn.Parameter] | None = None, async_op: bool = False, **_: Any
    ) -> None:
        """Gathers parameters until `partition()`. Collective."""
        for param in _all(self, param_list):
            if param not in _open:
                stack = contextlib.ExitStack()
                stack.enter_context(ds_zero.gathered(param, write=True))
                _open[param] = stack

    def partition(self, param_list: Sequence[nn.Parameter] | None = None, **_: Any) -> None:
        """Undoes `all_gather`. Rank 0's values are kept on all ranks. Collective."""
        for param in _all(self, param_list):
            stack = _open.pop(param, None)
            if stack is not None:
                stack.close()


def known(param: Any) -> bool:
    """Whether stage 3 shards the parameter, or keeps it whole because it is small."""
    status = ds_zero.presence(param)
    return status is not None and (status.divided or status.kept)


def _all(param: Any, others: Iterable[nn.Parameter] | None) -> list[nn.Parameter]:
    return list(others) if others is not None else [param]


@functools.lru_cache(None)
def _subclass(kind: type) -> type:
    return type(
        kind.__name__, (Divided, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    )


def present(params: Iterable[nn.Parameter]) -> None:
    """Adds the properties to parameters, which may have them already, and need not be sharded."""
    for param in params:
        if not isinstance(param, Divided):
            param.__class__ = _subclass(type(param))
        vars(param).setdefault("_ds_number", next(_numbers))


def is_zero_param(parameter: Any) -> bool:
    """Whether the parameter is sharded at stage 3, or is going to be."""
    return hasattr(parameter, "ds_id")
