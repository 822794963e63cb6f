"""The topology of a job: named axes, and the coordinates of one rank on them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

AXES = ("pipe", "replicate", "data", "expert", "sequence", "tensor")
"""Names of the axes, outermost first: ranks that differ only in the last one have consecutive numbers. A `DeviceMesh`
that is passed between packages has these dimension names, in this order.
"""

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
    """One axis, and the coordinate of one rank on it."""

    index: int
    """0 <= index < size."""
    size: int

    def __post_init__(self) -> None:
        """Raises ValueError for a coordinate outside of the axis."""
        if not 0 <= self.index < self.size:
            raise ValueError(
                f"coordinate {self.index} is outside of an axis with {self.size} ranks, which are numbered from 0"
            )


ALONE = Axis(0, 1)


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The axes of a job, with the coordinates of this rank."""

    pipe: Axis = ALONE
    """Ranks that hold different layers."""
    replicate: Axis = ALONE
    """Groups of `data` ranks that hold replicas of each other."""
    data: Axis = ALONE
    """Ranks that process different samples, and among which the state of the model is divided."""
    expert: Axis = ALONE
    """Ranks that hold different experts. The axis is part of `data`, so it adds no ranks."""
    sequence: Axis = ALONE
    """Ranks that process different tokens of the same samples."""
    tensor: Axis = ALONE
    """Ranks that hold different parts of each layer."""
    logical: bool = False
    """Whether checkpoints contain whole tensors, of which the ranks of `tensor` hold parts. False: the tensors of each
    of these ranks, with its coordinates, since only the caller's `mpu` knows how they make a whole."""

    def __post_init__(self) -> None:
        """Raises ValueError if the expert ranks do not divide the data axis."""
        if self.data.size % self.expert.size:
            raise ValueError(
                f"{self.expert.size} expert ranks do not divide the {self.data.size} data-parallel ranks"
            )

    def axis(self, name: str) -> Axis:
        """Returns the axis with a name in `AXES` or `ALIASES`.

        Raises:
            ValueError: there is no such axis.
        """
        known = ALIASES.get(name, name)
        if known not in AXES:
            raise ValueError(f"there is no axis {name!r}: the axes are {', '.join(AXES)}")
        axis: Axis = getattr(self, known)
        return axis

    @property
    def world_size(self) -> int:
        """Number of ranks of the job."""
        return math.prod(self.axis(name).size for name in AXES if name != "expert")

    @property
    def samples(self) -> Axis:
        """The combined axis of all ranks that process different samples: `replicate` x `data`."""
        return Axis(
            self.replicate.index * self.data.size + self.data.index, self.replicate.size * self.data.size
        )

    @property
    def shards(self) -> Axis:
        """The combined axis `data` x `sequence`, among whose ranks ZeRO divides the state of the model."""
        return Axis(
            self.data.index * self.sequence.size + self.sequence.index, self.data.size * self.sequence.size
        )

    @property
    def model(self) -> Axis:
        """The combined axis of all ranks that together hold one model: `pipe` x `tensor`."""
        return Axis(self.pipe.index * self.tensor.size + self.tensor.index, self.pipe.size * self.tensor.size)

    def seed_offset(self, rank: int) -> int:
        """Returns what is added to the seed on a rank. Ranks that share a layer need the same random numbers."""
        if not self.logical:
            return rank
        samples, sequence = self.samples, self.sequence
        return (self.pipe.index * samples.size + samples.index) * sequence.size + sequence.index

    def sizes(self) -> dict[str, int]:
        """Returns name -> size of every axis with more than one rank, outermost first."""
        return {name: self.axis(name).size for name in AXES if self.axis(name).size > 1}

    def __str__(self) -> str:
        return " x ".join(f"{name} {size}" for name, size in self.sizes().items()) or "one rank"
