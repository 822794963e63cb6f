"""Access to parameters between their construction and `shard`.

[Note: constructed parameters]
A parameter from `deferred_init` is a meta tensor with a record of its initialisation. To read it, its values are
computed by replay and take the place of the meta tensor for the duration of a context. A parameter from `divided_init`
is on its device and reads as NaN; its values are gathered from the ranks' slices. To load a checkpoint into either,
one rank writes the values, they are broadcast, and each rank keeps its slice. So between construction and `shard`, each
of N ranks has 1/N of the values that were written, and no memory for the others. `shard` gets the values of both kinds
from the same interface.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_zero import _registry
from ds_zero.interfaces import InitialValues
from ds_zero.tensors.fingerprint import fingerprint


class Slices:
    """One tensor, sharded evenly over the ranks of the default group."""

    def __init__(self, value: Tensor) -> None:
        """`value` is the whole tensor, with the same values on every rank."""
        self.shape, self._numel = tuple(value.shape), value.numel()
        ranks, rank = team()
        per_rank = -(-self._numel // ranks)
        self.own = value.new_zeros(per_rank)
        own = value.reshape(-1)[rank * per_rank : (rank + 1) * per_rank]
        self.own[: own.numel()].copy_(own)

    def whole(self) -> Tensor:
        """Returns a copy of the whole tensor. Collective."""
        ranks, _ = team()
        whole = self.own.new_empty(self.own.numel() * ranks)
        if ranks > 1:
            dist.all_gather(list(whole.chunk(ranks)), self.own)
        else:
            whole.copy_(self.own)
        return whole[: self._numel].view(self.shape)


class Written:
    """Values of a meta parameter that were written before `shard`."""

    def __init__(self, value: Tensor, before: InitialValues, place: int) -> None:
        """
        Args:
            value: all values, the same on every rank.
            before: the record of the parameter before it was written.
            place: index of the parameter in the order of construction.
        """
        self.stage, self._place = before.stage, place
        self._slices = Slices(value)

    def values(self, tensor: Tensor) -> Tensor:
        """Returns the whole tensor. Collective."""
        return self._slices.whole()

    def place(self, tensor: Tensor) -> int:
        return self._place

    def hides(self, tensor: Tensor) -> bool:
        return tensor.is_meta

    def own(self, tensor: Tensor) -> Tensor | None:
        return self._slices.own


class Constructed:
    """A parameter of `divided_init`: whole, or sharded with one slice on each rank and data that reads as NaN."""

    def __init__(self, stage: int | None, place: int, device: torch.device) -> None:
        """
        Args:
            place: index of the parameter in the order of construction.
            device: the training device.
        """
        self.stage, self._place, self._device = stage, place, device
        self._slices: Slices | None = None
        self._nan: Tensor | None = None
        """The NaN of which the parameter's data is a view while it is sharded."""

    def place(self, tensor: Tensor) -> int:
        return self._place

    def hides(self, tensor: Tensor) -> bool:
        return self._nan is not None and _same_memory(tensor, self._nan)

    def own(self, tensor: Tensor) -> Tensor | None:
        return self._slices.own if self._slices is not None and self.hides(tensor) else None

    def values(self, tensor: Tensor) -> Tensor:
        """Returns all values. Collective if the parameter is sharded, or was cast while it was."""
        if self._slices is None:
            return tensor.detach().clone()
        if self.hides(tensor):
            return self._slices.whole()
        # Other code has replaced `.data`. If all elements are NaN, it was cast or moved while it was sharded.
        if tensor.shape == self._slices.shape and bool(torch.isnan(tensor.detach()).all()):
            return self._slices.whole().to(tensor.device, tensor.dtype)
        return tensor.detach().clone()

    def show(self, param: nn.Parameter) -> None:
        """Makes a sharded parameter whole, and keeps this rank's slice. Collective."""
        # A copy, because the thread of the process group may refer to the gathered memory for a moment longer, and
        # `divided_init` does not shard a parameter to whose memory something else refers.
        param.data = self.values(param).clone()

    def hide(self, param: nn.Parameter) -> None:
        """Shards a parameter again after `show`, and discards changes of its values."""
        if self._nan is not None and self._slices is not None:
            param.data = self._nan.expand(self._slices.shape)

    def divide(self, param: nn.Parameter, source: int = 0) -> None:
        """Shards a parameter: keeps this rank's slice of rank `source`'s values. Collective."""
        value = param.detach().to(self._device).contiguous()
        if team()[0] > 1:
            dist.broadcast(value, src=source)
        self._slices = Slices(value)
        self._nan = torch.full((1,), torch.nan, dtype=value.dtype, device=value.device)
        self.hide(param)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return (
        one.device == other.device and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    )


def team() -> tuple[int, int]:
    """Returns (number of ranks, this rank) of the default process group; (1, 0) if there is none."""
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)


@contextlib.contextmanager
def gathered_before_shard(params: Sequence[nn.Parameter], writer: int | None) -> Iterator[None]:
    """Context manager in which parameters that are not sharded by `shard` yet have their values, [Note: constructed
    parameters]. With `writer`, that rank's values at the end are kept on all ranks. Collective.

    Raises:
        ValueError: values were changed without `writer`, and would be lost.
    """
    # Parameters that an outer context has made whole are left to that context.
    records = [(p, _registry.find_record(p)) for p in params]
    # Sorted, so that all ranks run the collectives in the same order.
    hidden = sorted(
        {id(p): (p, record) for p, record in records if record is not None and record.hides(p)}.values(),
        key=lambda pair: pair[1].place(pair[0]),
    )
    opened = [
        _GatheredDivided(param, record)
        if isinstance(record, Constructed)
        else _GatheredDeferred(param, record)
        for param, record in hidden
    ]
    lost: list[tuple[int, ...]] = []
    completed = False
    try:
        yield
        if writer is None:
            lost = [tuple(one.param.shape) for one in _changed_anywhere(opened)]
        completed = True
    finally:
        for one in opened:
            one.close(writer if completed else None)
    if lost:
        raise ValueError(
            f"parameters of shapes {lost} were written inside gathered(..., write=False) before ds_zero.shard: the "
            "change would be lost; pass write=True"
        )


class _Gathered:
    """A parameter with its values, between construction and `shard`."""

    def __init__(self, param: nn.Parameter) -> None:
        self.param = param
        self._before = _appearance(param)

    def changed(self) -> bool:
        """Whether this rank has written the parameter, or replaced its `.data`."""
        return _appearance(self.param) != self._before

    def close(self, writer: int | None) -> None:
        """Removes the values again. Collective with a writer.

        Args:
            writer: the rank whose values are kept; None: changes are discarded.
        """
        raise NotImplementedError


class _GatheredDeferred(_Gathered):
    """A parameter of `deferred_init`."""

    def __init__(self, param: nn.Parameter, record: InitialValues) -> None:
        self._record, self._place = record, record.place(param)
        self._meta = nn.Parameter(record.values(param), requires_grad=param.requires_grad)
        self._swap(param, record)
        super().__init__(param)

    def close(self, writer: int | None) -> None:
        record = self._record
        if writer is not None:
            value = self.param.detach().contiguous()
            if team()[0] > 1:
                dist.broadcast(value, src=writer)
            record = Written(value, record, self._place)
        self._swap(self.param, record)

    def _swap(self, param: nn.Parameter, record: InitialValues) -> None:
        _registry.drop_record(param)  # a tensor with weak references cannot be swapped
        swap(param, self._meta)
        _registry.put_record(param, record)


class _GatheredDivided(_Gathered):
    """A parameter of `divided_init`."""

    def __init__(self, param: nn.Parameter, record: Constructed) -> None:
        self._record = record
        record.show(param)
        super().__init__(param)

    def close(self, writer: int | None) -> None:
        if writer is None:
            self._record.hide(self.param)
        else:
            self._record.divide(self.param, writer)


def _appearance(param: nn.Parameter) -> tuple[tuple[int, ...], int]:
    return tuple(param.shape), fingerprint(param)


def _changed_anywhere(opened: Sequence[_Gathered]) -> list[_Gathered]:
    """Returns, on every rank, the parameters that at least one rank has changed. Collective."""
    if not opened:
        return []
    flags = torch.tensor([one.changed() for one in opened], dtype=torch.int32, device=opened[0].param.device)
    if team()[0] > 1:
        dist.all_reduce(flags)
    return [one for one, flag in zip(opened, flags.tolist(), strict=True) if flag]


def swap(param: nn.Parameter, other: nn.Parameter) -> None:
    """Exchanges the tensors of two Parameter objects; `param` keeps its class and attributes."""
    kind, attributes = type(param), dict(vars(param))
    torch.utils.swap_tensors(param, other)
    if type(param) is not kind:
        object.__setattr__(param, "__class__", kind)
    vars(param).update(attributes)
