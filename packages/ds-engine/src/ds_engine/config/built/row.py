"""What this version does with a key: one row of the table `BUILT`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeAlias

Inert: TypeAlias = tuple[Any, ...]


class State(Enum):
    """What setting a key leads to."""

    WORKS = "works"
    """It does what its description says."""
    NO_EFFECT = "no effect"
    """Accepted with any value: what it asks for is done anyway, or has no place in this design; the table at the
    start says so."""
    LATER = "not yet"
    """Refused when it asks for something, and the error names the package that will do it."""
    GONE = "removed"
    """Refused when it asks for something, and the error says what to use instead."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One key, or one section with everything in it that has no row of its own."""

    key: str
    """Dotted path."""
    owner: str
    """The package that does it, or will."""
    state: State
    why: str
    """WORKS: what reads it. NO_EFFECT: why there is nothing to do. LATER, GONE: what it is that is missing."""
    remedy: str = ""
    """LATER and GONE: what to do."""
    switches: Mapping[str, Inert] = field(default_factory=dict)
    """LATER and GONE: path -> values that ask for nothing, beside the default. Empty: the key itself, or `enabled`
    in it."""
    only: Callable[[Any], bool] | None = None
    """WORKS and LATER: whether this configuration gives the key a meaning; where not, it has no effect."""
    otherwise: str = ""
    """Why it has none there."""
    needs: str = ""
    """WORKS: a module that has to be installed for what `switches` turn on."""


def works(key: str, owner: str, why: str, **more: Any) -> Row:
    """A key that does what it says; `why` names what reads it."""
    return Row(key=key, owner=owner, state=State.WORKS, why=why, **more)


def no_effect(key: str, owner: str, why: str) -> Row:
    """A key that is accepted and changes nothing, and why."""
    return Row(key=key, owner=owner, state=State.NO_EFFECT, why=why)


def later(key: str, owner: str, why: str, remedy: str = "", **more: Any) -> Row:
    """A key that is refused until its owner has what it asks for."""
    return Row(key=key, owner=owner, state=State.LATER, why=why, remedy=remedy, **more)


def gone(key: str, owner: str, why: str, remedy: str, **more: Any) -> Row:
    """A key that is refused for good."""
    return Row(key=key, owner=owner, state=State.GONE, why=why, remedy=remedy, **more)
