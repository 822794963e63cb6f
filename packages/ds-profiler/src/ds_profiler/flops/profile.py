"""What a profile says, as values: a tree of modules with their work, time and parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ds_profiler.flops.formulas import NONE, Work


@dataclass(frozen=True, kw_only=True)
class ModuleProfile:
    """One module, with everything that happened in it and in the modules below it."""

    name: str
    """Qualified name; the model itself has the name ""."""
    kind: str
    """Class of the module."""
    details: str
    """What the module says of itself, such as `in_features=4, out_features=8, bias=True`."""
    params: int
    """Number of elements of the distinct parameters at and below it, whole also where they are sharded."""
    calls: int
    """How often its forward ran, without recomputation."""
    forward: Work
    backward: Work
    recomputed: Work
    """Forward that ran again during the backward (activation checkpointing)."""
    forward_s: float
    """Seconds between the beginning and the end of its forward, without what the profiler itself took. Modules whose
    forward is never called, such as ModuleList, have the sum of their children.
    """
    backward_s: float
    """Seconds in the operations of its backward, recomputation included."""
    children: tuple[ModuleProfile, ...]

    @property
    def total(self) -> Work:
        """All of its work."""
        return self.forward + self.backward + self.recomputed

    def walk(self, depth: int = 0) -> Iterator[tuple[int, ModuleProfile]]:
        """This module and all below it, with their depths; parents before their children."""
        yield depth, self
        for child in self.children:
            yield from child.walk(depth + 1)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "kind": self.kind,
            "params": self.params,
            "calls": self.calls,
            **{f"{part}_macs": work.macs for part, work in self._parts()},
            **{f"{part}_flops": work.flops for part, work in self._parts()},
            "forward_s": self.forward_s,
            "backward_s": self.backward_s,
            "children": [child.as_dict() for child in self.children],
        }

    def _parts(self) -> tuple[tuple[str, Work], ...]:
        return ("forward", self.forward), ("backward", self.backward), ("recomputed", self.recomputed)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Everything that ran while a profiler recorded."""

    model: ModuleProfile
    outside_forward: Work = NONE
    """Forward outside of every module, such as a loss function."""
    outside_backward: Work = NONE
    unknown: Mapping[str, int]
    """Calls of operations without a formula, by name: their work is missing here."""
    forwards: int
    """How often the model's forward ran."""

    @property
    def forward(self) -> Work:
        """Work of all forwards."""
        return self.model.forward + self.outside_forward

    @property
    def backward(self) -> Work:
        """Work of all backwards, without recomputation."""
        return self.model.backward + self.outside_backward

    @property
    def total(self) -> Work:
        """All work."""
        return self.forward + self.backward + self.model.recomputed

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "forwards": self.forwards,
            "outside_forward_flops": self.outside_forward.flops,
            "outside_backward_flops": self.outside_backward.flops,
            "without_formula": dict(self.unknown),
            "model": self.model.as_dict(),
        }
