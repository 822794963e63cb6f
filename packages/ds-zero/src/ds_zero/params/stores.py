"""The default store of shards: the device of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ds_zero.comm.works import Done
from ds_zero.interfaces import Reservation, ShardKey, Work


class ResidentStore:
    """The default store: keeps every partition as one tensor on the model's device. Nothing is copied, so the work
    handles that it returns are complete at once.
    """

    def __init__(self) -> None:
        self._resting: dict[ShardKey, Tensor] = {}

    def reserve(self, plan: Sequence[Reservation]) -> Mapping[ShardKey, Tensor]:
        partitions: dict[tuple[str, torch.dtype, torch.device], list[Reservation]] = {}
        for item in plan:
            partitions.setdefault((item.partition, item.dtype, item.device), []).append(item)
        reserved: dict[ShardKey, Tensor] = {}
        for (_, dtype, device), items in partitions.items():
            whole = self._allocate(sum(i.numel for i in items), dtype, device)
            for item, part in zip(items, torch.split(whole, [i.numel for i in items]), strict=True):
                reserved[item.key] = part
        self._resting.update(reserved)
        return reserved

    def _allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(numel, dtype=dtype, device=device)

    def load(self, key: ShardKey, out: Tensor) -> Work:
        out.copy_(self._resting[key])
        return Done()

    def store(self, key: ShardKey, src: Tensor) -> Work:
        self._resting[key].copy_(src)
        return Done()

    def sink_grad(self, key: ShardKey, grad: Tensor, *, offset: int, accumulate: bool) -> Work:
        place = self._resting[key][offset : offset + grad.numel()]
        if accumulate:
            place.add_(grad.to(place.device))
        else:
            place.copy_(grad)
        return Done()

    def release(self, key: ShardKey) -> None:
        self._resting.pop(key, None)

    def close(self) -> None:
        self._resting.clear()
