"""Which tensor is stored where: on the device, in host memory, or on a disk."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ds_offload.interfaces import ChoosesTiers, Key, Reservation, Tier

STEPPED = ("master", "grad", "state")
"""Kinds that an optimizer step uses. If those of a bucket are on the device, the bucket is stepped there."""


@dataclass(frozen=True, kw_only=True)
class TiersByKind:
    """Stores each kind of tensor in one place, except for two fractions that stay closer to the device."""

    host: Collection[str] = ()
    """The kinds in host memory."""
    disk: Collection[str] = ()
    """The kinds on a disk. All others stay on the device."""
    ratio: float = 1.0
    """Fraction of the elements that are stepped in host memory, if masters are stored there or on a disk. The masters,
    gradients and states of the others stay on the device. Whole buckets are chosen, so that the fraction on the device
    is never larger than 1 - ratio."""
    max_in_cpu: int = 0
    """Number of elements of "param" that stay in host memory if parameters are on a disk; whole buckets."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio <= 1.0:
            raise ValueError(f"ratio={self.ratio}: it is a fraction of the elements, between 0 and 1")
        if self.max_in_cpu < 0:
            raise ValueError(f"max_in_cpu={self.max_in_cpu}: it is a number of elements, at least 0")

    def __call__(self, plan: Sequence[Reservation]) -> Sequence[Tier]:
        """Returns the tier of each tensor."""
        sizes = {item.key.name: item.numel for item in plan if item.key.kind == "state"}
        resident = _first_that_fit(sizes, (1.0 - self.ratio) * sum(sizes.values()))
        params = {
            i.key.name: i.numel for i in plan if i.key.kind == "param" and "param" in self.disk and i.numel
        }
        in_cpu = _first_that_fit(params, self.max_in_cpu)

        def tier(item: Reservation) -> Tier:
            if item.key.kind in STEPPED and item.key.name in resident:
                return "device"
            if item.key.kind in self.disk:
                return "host" if item.key.kind == "param" and item.key.name in in_cpu else "disk"
            return "host" if item.key.kind in self.host else "device"

        return [tier(item) for item in plan]


def _first_that_fit(sizes: dict[str, int], limit: float) -> frozenset[str]:
    """Returns names whose sizes have a sum of at most `limit`: one after the other, without those that do not fit."""
    chosen: set[str] = set()
    for name, size in sizes.items():
        if size <= limit:
            chosen.add(name)
            limit -= size
    return frozenset(chosen)


@dataclass(frozen=True, kw_only=True)
class _States:
    """The item that stands for the optimizer states of one bucket."""

    key: _StatesKey
    numel: int
    device: torch.device
    partition: str = "states"
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, kw_only=True)
class _StatesKey:
    name: str
    kind: str = "state"


def with_states(plan: Sequence[Reservation]) -> list[Reservation]:
    """Returns `plan` and an item of kind "state" for each bucket with gradients."""
    states = [
        _States(key=_StatesKey(name=item.key.name), numel=item.numel, device=item.device)
        for item in plan
        if item.key.kind == "grad"
    ]
    return [*plan, *states]


@dataclass(eq=False)
class KnownTiers:
    """The tiers that were chosen for the tensors of a store. A tensor that is reserved later is stored with the first
    one of its bucket and kind: further partial sums of gradients, second versions.
    """

    choose: ChoosesTiers
    _known: dict[tuple[str, str], Tier] = field(default_factory=dict)

    def of(self, plan: Sequence[Reservation]) -> list[Tier]:
        """Returns the tier of each tensor of one call of `reserve`."""
        new = [item for item in plan if self.known(item.key) is None and chosen_by_caller(item) is None]
        items = with_states(new)
        for item, tier in zip(items, self.choose(items), strict=True):
            self._known[item.key.name, item.key.kind] = tier
        return [chosen_by_caller(item) or self.known(item.key) or "device" for item in plan]

    def known(self, key: Key) -> Tier | None:
        """Returns the tier of a key, or of the key whose partial sum it is; None if it was not reserved."""
        return self._known.get((key.name, key.kind)) or self._known.get(
            (key.name.rpartition("+")[0], key.kind)
        )

    def of_states(self, name: str) -> Tier | None:
        """Returns the tier of the optimizer states of a bucket."""
        return self._known.get((name, "state"))


def chosen_by_caller(item: Reservation) -> Tier | None:
    """Returns the tier that a page of a `PagedOptimizer` asks for."""
    tier: Tier | None = getattr(item, "tier", None)
    return tier


@dataclass(frozen=True, kw_only=True)
class TiersByName:
    """Stores each tensor where a table says."""

    tiers: Mapping[str, Mapping[str, Tier]]
    """Bucket -> kind -> tier. What is missing stays on the device."""

    def __call__(self, plan: Sequence[Reservation], /) -> Sequence[Tier]:
        """Returns the tier of each tensor."""
        return [self.tiers.get(item.key.name, {}).get(item.key.kind, "device") for item in plan]
