"""Where the tensors of a planned job are stored."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from ds_zero.interfaces import Reservation, ShardKey, Tier

STATE = "state"
"""Kind of the items that stand for the states of the optimizer."""


def with_states(plan: Sequence[Reservation]) -> list[Reservation]:
    """Returns `plan` and an item of kind "state" for each bucket with gradients."""
    states = [
        replace(item, key=ShardKey(name=item.key.name, kind=STATE), partition="states", dtype=torch.float32)
        for item in plan
        if item.key.kind == "grad"
    ]
    return [*plan, *states]


@dataclass(frozen=True, kw_only=True)
class ByKind:
    """Stores each kind of tensor in one place."""

    host: Collection[str] = ()
    """The kinds in host memory. States are there, too, if masters are."""
    disk: Collection[str] = ()
    """The kinds on a disk. All others stay on the device."""

    def __call__(self, plan: Sequence[Reservation]) -> Sequence[Tier]:
        host = set(self.host) | ({STATE} if "master" in {*self.host, *self.disk} else set())

        def tier(kind: str) -> Tier:
            return "disk" if kind in self.disk else "host" if kind in host else "device"

        return [tier(item.key.kind) for item in plan]
