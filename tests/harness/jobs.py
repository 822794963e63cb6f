"""What the process of pytest and the processes of the ranks tell each other."""

from __future__ import annotations

import enum
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

WarningFilter = tuple[str, "re.Pattern[str] | None", type[Warning], "re.Pattern[str] | None", int]


class Kind(enum.Enum):
    """How a rank left the body of a test."""

    PASSED = "passed"
    SKIPPED = "skipped"
    XFAILED = "xfailed"
    FAILED = "failed"


@dataclass(frozen=True)
class Body:
    """Where a rank finds the function: pickle cannot say it, since the name leads to the decorated one."""

    module: str
    file: str
    qualname: str


@dataclass(frozen=True)
class FreshMonkeyPatch:
    """Stands for the `monkeypatch` fixture: each rank makes its own, and undoes it after the body."""


@dataclass(frozen=True)
class Job:
    """One rank's part of one test. `payload` is pickled apart: it may need classes of the test's own
    module, which the rank has to load first."""

    body: Body
    rank: int
    world_size: int
    timeout_s: float
    groups_may_stay: bool
    store_file: str
    cwd: str
    environ: Mapping[str, str]
    sys_path: tuple[str, ...]
    payload: bytes


@dataclass(frozen=True)
class Report:
    """What became of one rank's body. `when_s` is CLOCK_MONOTONIC, which all processes of a machine share."""

    kind: Kind
    headline: str = ""
    text: str = ""
    when_s: float = 0.0
    in_group: bool = True


@dataclass(frozen=True)
class Finish:
    """Sent to a rank when every rank has left the body as expected: meet at a barrier, for at most
    `barrier_s` seconds (None: no barrier, since a body took its group down), and take the group down."""

    barrier_s: float | None


def pack_payload(arguments: Mapping[str, Any]) -> bytes:
    """Pickles a body's arguments and the warning filters in force; TypeError names what cannot be sent."""
    packed: dict[str, Any] = {}
    for name, value in arguments.items():
        sent = FreshMonkeyPatch() if isinstance(value, pytest.MonkeyPatch) else value
        try:
            pickle.dumps(sent)
        except Exception as error:  # pickle lets through whatever a __reduce__ raises
            raise TypeError(
                f"{name}={value!r} cannot be sent to the rank processes ({type(error).__name__}: {error}). "
                f"Pass a picklable value (a module-level function instead of a lambda, a number, a path) "
                f"and build the object inside the test's body."
            ) from error
        packed[name] = sent
    return pickle.dumps((packed, [tuple(entry) for entry in warnings.filters]))


def unpack_payload(payload: bytes) -> tuple[dict[str, Any], list[WarningFilter]]:
    """The arguments (with `FreshMonkeyPatch` where a fixture has to be made) and the warning filters."""
    arguments, filters = pickle.loads(payload)
    return arguments, filters
