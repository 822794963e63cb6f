"""Two settings that do not go together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ds_engine.job.choices import Choices


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Two incompatible settings."""

    first: str
    second: str
    applies: Callable[[Choices], bool]
    reason: str
    remedy: str
    refuse: bool = True
    """True: an error. False: a warning that the first has no effect."""
