"""The status of a key in this version: one row of the table `BUILT`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeAlias

Inert: TypeAlias = tuple[Any, ...]


class State(Enum):
    """The effect of setting a key."""

    WORKS = "works"
    """The key does what its description says."""
    NO_EFFECT = "no effect"
    """Accepted with any value, without effect: its effect always happens, or does not exist in this design. The
    start-up table lists it.
    """
    LATER = "not yet"
    """Refused unless it is turned off. The error names the package that will support it."""
    GONE = "removed"
    """Refused unless it is turned off. The error says what to use instead."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The status of one key, or of a section with all keys in it that have no row."""

    key: str
    """Dotted path."""
    owner: str
    """The package that supports the key, or will."""
    state: State
    why: str
    """WORKS: what reads the key. NO_EFFECT: why it has no effect. LATER, GONE: the missing feature."""
    remedy: str = ""
    """LATER and GONE: what the user should do."""
    switches: Mapping[str, Inert] = field(default_factory=dict)
    """LATER and GONE: path -> values, other than the default, that turn the feature off. Empty: the key itself, or
    `enabled` in it.
    """
    only: Callable[[Any], bool] | None = None
    """WORKS and LATER: whether the key has an effect in this configuration."""
    otherwise: str = ""
    """Why the key has no effect if `only` returns False."""
    needs: str = ""
    """WORKS: the module that must be installed if one of `switches` turns the feature on."""


def works(key: str, owner: str, why: str, **more: Any) -> Row:
    """A row for a key that works; `why` names what reads it."""
    return Row(key=key, owner=owner, state=State.WORKS, why=why, **more)


def no_effect(key: str, owner: str, why: str) -> Row:
    """A row for a key that is accepted without effect; `why` is the reason."""
    return Row(key=key, owner=owner, state=State.NO_EFFECT, why=why)


def later(key: str, owner: str, why: str, remedy: str = "", **more: Any) -> Row:
    """A row for a key that is refused until its owner supports it."""
    return Row(key=key, owner=owner, state=State.LATER, why=why, remedy=remedy, **more)


def gone(key: str, owner: str, why: str, remedy: str, **more: Any) -> Row:
    """A row for a key that will not be supported."""
    return Row(key=key, owner=owner, state=State.GONE, why=why, remedy=remedy, **more)
