"""The range of a logical tensor that this rank holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True, kw_only=True)
class Placed:
    """This rank's elements of one logical tensor."""

    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    flat_offset: int
    """First element within the flattened tensor."""
    data: Tensor
    """1-D and contiguous: a view of the live tensor, or a copy of it."""
    replicated: bool
    """Whether every rank that has the tensor holds all of it."""
    writes: bool
    """Whether this rank writes the elements. Not decided yet if `replicated`."""
    put_back: Callable[[], None]
    """Copies `data` into the live tensor after a load. Collective if `place` was."""


def place(tensor: Tensor) -> Placed:
    """Returns this rank's elements of an ordinary tensor or a DTensor. Collective for a DTensor that is not sharded
    by rows: its elements would form many ranges, so it is redistributed by rows.
    """
    live = tensor.detach()
    if not isinstance(live, DTensor):
        flat = live.contiguous().view(-1)
        is_view = live.is_contiguous()
        return Placed(
            shape=tuple(live.shape),
            flat_offset=0,
            data=flat,
            replicated=True,
            writes=True,
            put_back=_nothing if is_view else lambda: _copy(live, flat.view(live.shape)),
        )
    if live.device_mesh.get_coordinate() is None or all(_is_by_rows(p) for p in live.placements):
        return _by_rows(live, _nothing)
    first = next((i for i, p in enumerate(live.placements) if not isinstance(p, Replicate)), 0)
    rows = live.redistribute(
        placements=[Shard(0) if i == first else Replicate() for i in range(live.device_mesh.ndim)]
    )
    return _by_rows(
        rows, lambda: _copy(live.to_local(), rows.redistribute(placements=live.placements).to_local())
    )


def _nothing() -> None:
    """Does nothing: `data` is the live tensor."""


def _copy(target: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        target.copy_(value)


def _is_by_rows(placement: object) -> bool:
    # Subclasses, as in 2-D parallelism, order rows differently.
    return isinstance(placement, Replicate) or (type(placement) is Shard and placement.dim == 0)


def _by_rows(tensor: DTensor, put_back: Callable[[], None]) -> Placed:
    mesh, shape = tensor.device_mesh, tuple(tensor.shape)
    local = tensor.to_local()
    coordinate = mesh.get_coordinate()
    writes, offset = False, 0
    if coordinate is not None:
        _, offsets = compute_local_shape_and_global_offset(shape, mesh, tensor.placements)
        offset = offsets[0] * math.prod(shape[1:]) if shape else 0
        copies = [c for c, p in zip(coordinate, tensor.placements, strict=True) if isinstance(p, Replicate)]
        empty_twin = local.numel() == 0 and any(coordinate)
        writes = not any(copies) and not empty_twin
    flat = local.contiguous().view(-1)

    def put_back_copy() -> None:
        _copy(local, flat.view(local.shape))
        put_back()

    return Placed(
        shape=shape,
        flat_offset=min(offset, math.prod(shape)),
        data=flat,
        replicated=False,
        writes=writes,
        put_back=put_back if local.is_contiguous() else put_back_copy,
    )
