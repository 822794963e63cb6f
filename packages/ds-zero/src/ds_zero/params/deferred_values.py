"""Deferred parameters between construction and `shard`: whole for a while, and written before they are sharded.

[Note: waiting parameters]
A parameter from `deferred_init` is a meta tensor with a record of its initialisation. To look at it, its values are
made by replay and swapped in, and the meta tensor is swapped back afterwards. To load a checkpoint into it, one rank
writes, all receive that rank's values, and each keeps its slice: between construction and `shard` a rank holds one
part in N of what was written, and nothing of what was not. `shard` asks the record for the values, whichever kind it
is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_zero import _registry
from ds_zero.interfaces import InitialValues


class Written:
    """Values that were written before `shard`; this rank keeps its slice of them."""

    def __init__(self, value: Tensor, before: InitialValues, place: int) -> None:
        """Args: value: all of them, the same on every rank. place: of the parameter in the order of construction."""
        self.stage, self._place = before.stage, place
        self._shape, self._numel = tuple(value.shape), value.numel()
        ranks, rank = _team()
        per_rank = -(-self._numel // ranks)
        self._slice = value.new_zeros(per_rank)
        own = value.reshape(-1)[rank * per_rank : (rank + 1) * per_rank]
        self._slice[: own.numel()].copy_(own)

    def values(self, tensor: Tensor) -> Tensor:
        """Collective."""
        ranks, _ = _team()
        whole = self._slice.new_empty(self._slice.numel() * ranks)
        if ranks > 1:
            dist.all_gather(list(whole.chunk(ranks)), self._slice)
        else:
            whole.copy_(self._slice)
        return whole[: self._numel].view(self._shape)

    def place(self, tensor: Tensor) -> int:
        return self._place


def _team() -> tuple[int, int]:
    """(number of ranks, own rank) of the default group."""
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)


@contextlib.contextmanager
def whole_for_a_while(params: Sequence[nn.Parameter], writer: int | None) -> Iterator[None]:
    """Deferred parameters with values inside; with `writer`, that rank's values stay, on all ranks.

    Collective. Raises ValueError for values that were changed without `writer`: they would be lost.
    """
    # What is whole already, in a context around this one, belongs to that one.
    found = [(p, _registry.find_record(p)) for p in params if p.is_meta]
    # All ranks in one order, in whatever order they were named.
    waiting = sorted(
        {id(p): (p, record) for p, record in found if record is not None}.values(),
        key=lambda pair: pair[1].place(pair[0]),
    )
    stand_ins = []
    for param, record in waiting:
        place = record.place(param)
        stand_in = nn.Parameter(record.values(param), requires_grad=param.requires_grad)
        _registry.drop_record(param)  # tensors that something points to weakly cannot be swapped
        swap(param, stand_in)
        _registry.put_record(param, record)
        stand_ins.append((stand_in, place, param._version))
    written: list[InitialValues | None] = [None] * len(waiting)
    lost: list[tuple[int, ...]] = []
    try:
        yield
        for i, ((param, record), (_, place, version)) in enumerate(zip(waiting, stand_ins, strict=True)):
            if writer is not None:
                value = param.detach().contiguous()
                if _team()[0] > 1:
                    dist.broadcast(value, src=writer)
                written[i] = Written(value, record, place)
            elif param._version != version:
                lost.append(tuple(param.shape))
    finally:
        for (param, record), (stand_in, _, _), new in zip(waiting, stand_ins, written, strict=True):
            _registry.drop_record(param)
            swap(param, stand_in)
            _registry.put_record(param, new or record)
    if lost:
        raise ValueError(
            f"deferred parameters of shapes {lost} were written while gathered for reading: the change would be lost; "
            "say which rank writes"
        )


def swap(param: nn.Parameter, other: nn.Parameter) -> None:
    """Exchange the tensors behind two Parameter objects; class and attributes of `param` stay with it."""
    kind, attributes = type(param), dict(vars(param))
    torch.utils.swap_tensors(param, other)
    if type(param) is not kind:
        object.__setattr__(param, "__class__", kind)
    vars(param).update(attributes)
