"""What a rank has called, as values that can be sent to other ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

KEPT = 64
"""Calls of each group that a rank remembers."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One collective."""

    number: int
    """Of the collectives of its group on this rank, from 0."""
    name: str
    tensors: tuple[str, ...]
    """Each tensor as text, for example "float32[3, 4]"; empty where ranks may pass different ones."""
    site: str
    """The line of the user's code, "file:line in function"."""
    subject: str = ""
    """Name of the parameter, or "gradient of" it, if the tensor is one."""

    def __str__(self) -> str:
        of = f" of {self.subject}" if self.subject else ""
        passed = f" ({', '.join(self.tensors)})" if self.tensors else ""
        return f"{self.name}{of}{passed} at {self.site}"


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a rank is."""

    rank: int
    place: str
    """The line of the user's code that runs now."""
    calls: Mapping[str, tuple[Call, ...]] = field(default_factory=dict)
    """Ranks of a group as text -> the last `KEPT` collectives of that group."""
    waits_in: str | None = None
    """The group of the collective that this rank is in; None: it is in none."""
    waited_s: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Position:
        raw = json.loads(text)
        raw["calls"] = {
            group: tuple(Call(**{**call, "tensors": tuple(call["tensors"])}) for call in calls)
            for group, calls in raw["calls"].items()
        }
        return cls(**raw)
