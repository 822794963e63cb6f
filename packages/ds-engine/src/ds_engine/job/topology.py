"""How the ranks of a job are arranged: named axes, and where one rank stands on each of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

AXES = ("pipe", "replicate", "data", "expert", "sequence", "tensor")
"""Names of the axes, outermost first: ranks that differ only in the last one are neighbours. The dimensions of a
`DeviceMesh` that crosses packages have these names, in this order."""

ALIASES: Mapping[str, str] = {
    "pp": "pipe",
    "dp_replicate": "replicate",
    "dp_shard": "data",
    "ep": "expert",
    "cp": "sequence",
    "tp": "tensor",
}
"""torch's usual names -> ours."""


@dataclass(frozen=True)
class Axis:
    """One axis, seen from one rank."""

    index: int
    """0 <= index < size."""
    size: int

    def __post_init__(self) -> None:
        """Refuses a coordinate outside the axis."""
        if not 0 <= self.index < self.size:
            raise ValueError(
                f"coordinate {self.index} is not on an axis of {self.size} ranks, which count from 0"
            )


ALONE = Axis(0, 1)


@dataclass(frozen=True, kw_only=True)
class Topology:
    """All ranks of a job, as this rank sees them."""

    pipe: Axis = ALONE
    """Ranks that hold different layers."""
    replicate: Axis = ALONE
    """Groups of `data` ranks that hold the same."""
    data: Axis = ALONE
    """Ranks that see different samples and divide the state of the model among themselves."""
    expert: Axis = ALONE
    """Ranks that hold different experts. It is folded inside of `data`, so it adds no ranks."""
    sequence: Axis = ALONE
    """Ranks that see different tokens of the same samples."""
    tensor: Axis = ALONE
    """Ranks that hold different parts of each layer."""

    def __post_init__(self) -> None:
        """Refuses experts that do not fit into the data axis."""
        if self.data.size % self.expert.size:
            raise ValueError(
                f"{self.expert.size} expert ranks do not divide the {self.data.size} data ranks that hold them"
            )

    def axis(self, name: str) -> Axis:
        """The axis of a name in `AXES` or `ALIASES`.

        Raises:
            ValueError: there is no such axis.
        """
        known = ALIASES.get(name, name)
        if known not in AXES:
            raise ValueError(f"there is no axis {name!r}: the axes are {', '.join(AXES)}")
        found: Axis = getattr(self, known)
        return found

    @property
    def world_size(self) -> int:
        """Number of ranks of the job."""
        return math.prod(self.axis(name).size for name in AXES if name != "expert")

    @property
    def samples(self) -> Axis:
        """Over all ranks that see different samples: `replicate` x `data`."""
        return Axis(
            self.replicate.index * self.data.size + self.data.index, self.replicate.size * self.data.size
        )

    @property
    def model(self) -> Axis:
        """Over all ranks that together hold one copy of the model: `pipe` x `tensor`."""
        return Axis(self.pipe.index * self.tensor.size + self.tensor.index, self.pipe.size * self.tensor.size)

    def sizes(self) -> dict[str, int]:
        """Name -> size of every axis of more than one rank, outermost first."""
        return {name: self.axis(name).size for name in AXES if self.axis(name).size > 1}

    def __str__(self) -> str:
        return " x ".join(f"{name} {size}" for name, size in self.sizes().items()) or "one rank"
