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
    """One tensor divided evenly among the ranks of the default group; this rank holds its slice."""

    def __init__(self, value: Tensor) -> None:
        """Args: value: the whole tensor, the same on every rank."""
        self.shape, self._numel = tuple(value.shape), value.numel()
        ranks, rank = team()
        per_rank = -(-self._numel // ranks)
        self.own = value.new_zeros(per_rank)
        own = value.reshape(-1)[rank * per_rank : (rank + 1) * per_rank]
        self.own[: own.numel()].copy_(own)

    def whole(self) -> Tensor:
        """The whole tensor, a copy. Collective."""
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
        """Args: value: all of them, the same on every rank. place: of the parameter in the order of construction."""
        self.stage, self._place = before.stage, place
        self._slices = Slices(value)

    def values(self, tensor: Tensor) -> Tensor:
        """Collective."""
        return self._slices.whole()

    def place(self, tensor: Tensor) -> int:
        return self._place

    def hides(self, tensor: Tensor) -> bool:
        return tensor.is_meta

    def own(self, tensor: Tensor) -> Tensor | None:
        return self._slices.own


class Constructed:
    """A parameter of `divided_init`: whole, or one slice on each rank and NaN where its values would be."""

    def __init__(self, stage: int | None, place: int, device: torch.device) -> None:
        """Args: place: of the parameter in the order of construction. device: where it is to be trained."""
        self.stage, self._place, self._device = stage, place, device
        self._slices: Slices | None = None
        self._hole: Tensor | None = None
        """The one element that the parameter shows while it is divided."""

    def place(self, tensor: Tensor) -> int:
        return self._place

    def hides(self, tensor: Tensor) -> bool:
        return self._hole is not None and _same_memory(tensor, self._hole)

    def own(self, tensor: Tensor) -> Tensor | None:
        return self._slices.own if self._slices is not None and self.hides(tensor) else None

    def values(self, tensor: Tensor) -> Tensor:
        """Collective where the parameter is divided, or was cast while it was."""
        if self._slices is None:
            return tensor.detach().clone()
        if self.hides(tensor):
            return self._slices.whole()
        # `.data` was replaced by something else than `show`: NaN alone is the hole itself, cast or moved.
        if tensor.shape == self._slices.shape and bool(torch.isnan(tensor.detach()).all()):
            return self._slices.whole().to(tensor.device, tensor.dtype)
        return tensor.detach().clone()

    def show(self, param: nn.Parameter) -> None:
        """Make a divided parameter whole; this rank's slice stays until it is divided anew. Collective."""
        # A copy: the process group's thread may hold the gathered memory for a moment after it is there, and
        # `divided_init` leaves a parameter whole whose memory somebody else holds.
        param.data = self.values(param).clone()

    def hide(self, param: nn.Parameter) -> None:
        """Forget what was done to a shown parameter since it was divided."""
        if self._hole is not None and self._slices is not None:
            param.data = self._hole.expand(self._slices.shape)

    def divide(self, param: nn.Parameter, source: int = 0) -> None:
        """Keep this rank's slice of rank `source`'s values, and show NaN. Collective."""
        value = param.detach().to(self._device).contiguous()
        if team()[0] > 1:
            dist.broadcast(value, src=source)
        self._slices = Slices(value)
        self._hole = torch.full((1,), torch.nan, dtype=value.dtype, device=value.device)
        self.hide(param)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return (
        one.device == other.device and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    )


def team() -> tuple[int, int]:
    """(number of ranks, own rank) of the default group."""
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)


@contextlib.contextmanager
def whole_for_a_while(params: Sequence[nn.Parameter], writer: int | None) -> Iterator[None]:
    """Waiting parameters with values inside; with `writer`, that rank's values stay, on all ranks.

    Collective. Raises ValueError for values that were changed without `writer`: they would be lost.
    """
    # What is whole already, in a context around this one, belongs to that one.
    records = [(p, _registry.find_record(p)) for p in params]
    # All ranks in one order, in whatever order they were named.
    waiting = sorted(
        {id(p): (p, record) for p, record in records if record is not None and record.hides(p)}.values(),
        key=lambda pair: pair[1].place(pair[0]),
    )
    opened = [
        _DividedLook(param, record) if isinstance(record, Constructed) else _DeferredLook(param, record)
        for param, record in waiting
    ]
    lost: list[tuple[int, ...]] = []
    completed = False
    try:
        yield
        if writer is None:
            lost = [tuple(look.param.shape) for look in _changed_anywhere(opened)]
        completed = True
    finally:
        for look in opened:
            look.close(writer if completed else None)
    if lost:
        raise ValueError(
            f"deferred parameters of shapes {lost} were written while gathered for reading: the change would be lost; "
            "say which rank writes"
        )


class _Look:
    """A waiting parameter while it is whole."""

    def __init__(self, param: nn.Parameter) -> None:
        self.param = param
        self._before = _appearance(param)

    def changed(self) -> bool:
        """Whether this rank has written it, or replaced its `.data`."""
        return _appearance(self.param) != self._before

    def close(self, writer: int | None) -> None:
        """Let it wait again. Collective with a writer.

        Args:
            writer: the rank whose values stay; None: those from before stay.
        """
        raise NotImplementedError


class _DeferredLook(_Look):
    """Of a meta parameter."""

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
        _registry.drop_record(param)  # tensors that something points to weakly cannot be swapped
        swap(param, self._meta)
        _registry.put_record(param, record)


class _DividedLook(_Look):
    """Of a parameter of `divided_init`."""

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


def _changed_anywhere(looks: Sequence[_Look]) -> list[_Look]:
    """Those that some rank has changed, on every rank. Collective."""
    if not looks:
        return []
    flags = torch.tensor([look.changed() for look in looks], dtype=torch.int32, device=looks[0].param.device)
    if team()[0] > 1:
        dist.all_reduce(flags)
    return [look for look, flag in zip(looks, flags.tolist(), strict=True) if flag]


def swap(param: nn.Parameter, other: nn.Parameter) -> None:
    """Exchange the tensors behind two Parameter objects; class and attributes of `param` stay with it."""
    kind, attributes = type(param), dict(vars(param))
    torch.utils.swap_tensors(param, other)
    if type(param) is not kind:
        object.__setattr__(param, "__class__", kind)
    vars(param).update(attributes)
