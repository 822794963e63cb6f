"""Construction of a model whose parameters are sharded as soon as their module is constructed.

[Note: divided construction]
The construction code runs unchanged: all tensors are real, files and collectives can be used, and the random generator
is used as usual. A parameter is recorded when a module registers it. When another module registers its first parameter,
the parameters recorded before are normally initialised, and are sharded: rank 0's values are broadcast, each rank keeps
its slice, and the parameter reads as NaN. If a torch function is called with a sharded parameter (by a model that
scales the weights of a layer that it has just constructed), the parameter is gathered first, and sharded again later.
A parameter is not sharded while another tensor refers to its memory, such as `weight.data` in a variable. So each rank
holds its slices and a few whole parameters, and the values are those of ordinary construction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ds_zero import _registry
from ds_zero.params.deferred_values import Constructed, team

WHOLE_BYTES = 64 * 2**20
"""Bytes of parameters that were gathered because code used them, above which they are sharded again."""

_READING_GETTERS = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})
"""Attributes of a tensor that are views of its values; all others are metadata, or its gradient."""

_BLIND = frozenset(
    (
        *("__hash__", "__len__", "__get__", "__set__", "__delete__", "__repr__", "__format__"),
        *(
            "data_ptr",
            "dim",
            "dtype",
            "element_size",
            "get_device",
            "is_complex",
            "is_contiguous",
            "is_floating_point",
        ),
        *(
            "is_inference",
            "is_pinned",
            "is_set_to",
            "is_shared",
            "is_signed",
            "ndimension",
            "nelement",
            "numel",
        ),
        *("register_hook", "register_post_accumulate_grad_hook", "requires_grad_", "result_type", "can_cast"),
        *("size", "storage_offset", "stride", "untyped_storage"),
    )
)
"""Methods of a tensor, and functions on tensors, for which a sharded parameter is not gathered. Printing is one of
them, since one rank may print alone, but gathering needs all ranks."""


class _Whole:
    """The parameters that are whole at present, and the modules that registered them."""

    def __init__(self, stage: int | None, device: torch.device) -> None:
        self._stage, self._device = stage, device
        self._params: dict[int, tuple[nn.Parameter, int | None]] = {}
        self._shown_bytes = 0

    def note(self, module: nn.Module, param: nn.Parameter) -> None:
        """Records a parameter that `module` registers, and shards those of other modules. Collective."""
        known = _registry.find_record(param) is not None or _registry.find(param) is not None
        if known or param.is_meta or not param.is_floating_point() or type(param.data) is not Tensor:
            return
        self.divide(owner for owner in self._owners() if owner != id(module))
        _registry.put_record(param, Constructed(self._stage, _registry.next_place(), self._device))
        self._params[id(param)] = (param, id(module))

    def show(self, params: Iterable[nn.Parameter]) -> None:
        """Gathers those of `params` that are sharded. Collective if there are any."""
        hidden = []
        for param in params:
            record = _registry.find_record(param)
            if isinstance(record, Constructed) and record.hides(param):
                hidden.append((param, record))
        if hidden and self._shown_bytes > WHOLE_BYTES:
            self.divide([None])
        for param, record in hidden:
            record.show(param)
            self.keep(param)

    def keep(self, param: nn.Parameter) -> None:
        """Records a parameter of `divided_init` that is whole now."""
        if id(param) not in self._params and _registry.find_record(param) is not None:
            self._params[id(param)] = (param, None)
            self._shown_bytes += param.nbytes

    def divide(self, owners: Iterable[int | None]) -> None:
        """Shards the parameters that modules with these `id`s have registered (None: those that `show` has gathered),
        except those to whose memory another tensor refers. Collective.
        """
        wanted = set(owners)
        due = [param for param, owner in self._params.values() if owner in wanted]
        if due:
            self._divide([p for p, held in zip(due, _held(due, self._device), strict=True) if not held])

    def divide_all(self) -> None:
        """Shards all parameters. Collective."""
        self._divide([param for param, _ in self._params.values()])

    def _owners(self) -> set[int | None]:
        return {owner for _, owner in self._params.values()}

    def _divide(self, params: Iterable[nn.Parameter]) -> None:
        for param in params:
            _, owner = self._params.pop(id(param))
            if owner is None:
                self._shown_bytes -= param.nbytes
            record = _registry.find_record(param)
            if isinstance(record, Constructed):
                record.divide(param)


def _held(params: list[nn.Parameter], device: torch.device) -> list[bool]:
    """Returns, for each parameter, whether another tensor refers to its memory on rank 0. All ranks use rank 0's
    answer, because sharding is collective.
    """
    counts = [torch._C._storage_Use_Count(p.untyped_storage()._cdata) for p in params]
    flags = torch.tensor([count > 2 for count in counts], dtype=torch.int32, device=device)
    if team()[0] > 1:
        dist.broadcast(flags, src=0)
    return [bool(flag) for flag in flags.tolist()]


class _GatherArguments(TorchFunctionMode):
    """Gathers sharded parameters before torch functions that are called with them."""

    def __init__(self, whole: _Whole) -> None:
        super().__init__()
        self._whole = whole

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if name == "__set__" and attribute == "data" and isinstance(args[0], nn.Parameter):
            result = func(*args, **kwargs)
            self._whole.keep(args[0])
            return result
        if name not in _BLIND or (name == "__get__" and attribute in _READING_GETTERS):
            self._whole.show(p for p in tree_leaves((args, kwargs)) if isinstance(p, nn.Parameter))
        return func(*args, **kwargs)


@contextlib.contextmanager
def divided_init(stage: int | None = None, *, device: torch.device | str | None = None) -> Iterator[None]:
    """Context manager in which modules are constructed so that no rank holds more than a few whole parameters at a
    time.

    Everything else works as usual: other tensors are ordinary, files can be loaded, collectives run, and parameters
    are on the training device. Their values are those of ordinary construction on rank 0, bitwise. Afterwards they
    read as NaN, except inside `gathered`, until `shard` moves them into buckets. See [Note: divided construction].

    Compared with `deferred_init`, construction broadcasts every parameter, and `shard` does not repeat the
    initialisation. Collective: all ranks of the default process group must construct the same model. If the context
    is left by an exception, discard the model, which is only partly sharded.

    Args:
        stage: the stage of the later call of `shard`. If given, `shard` raises for another stage.
        device: the training device. Default: torch's default device.
    """
    whole = _Whole(stage, torch.device(device) if device is not None else torch.get_default_device())

    def note(module: nn.Module, _: str, value: Any) -> None:
        if isinstance(value, nn.Parameter):
            with torch._C.DisableTorchFunction():
                whole.note(module, value)

    handle = nn_module.register_module_parameter_registration_hook(note)
    try:
        with _GatherArguments(whole):
            yield
        whole.divide_all()
    finally:
        handle.remove()
