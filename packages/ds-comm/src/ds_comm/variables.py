"""Reads environment variables, and remembers which ones were read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
"""Values of MASTER_ADDR with which all ranks are on one machine."""
_T = TypeVar("_T")


class PlacementError(ValueError):
    """The environment variables are incomplete or contradict each other. The message names the variable and the
    remedy.
    """


class Variables:
    """Reads environment variables; raises PlacementError if one is missing or malformed. A blank one counts as
    missing.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.read: dict[str, str] = {}
        """Name -> value of every variable that was asked for and exists, in the order of the questions."""

    def __contains__(self, name: object) -> bool:
        return bool(self._environ.get(str(name), "").strip())

    def text(self, name: str, remedy: str) -> str:
        value = self._environ.get(name, "").strip()
        if not value:
            raise PlacementError(f"the environment variable {name} is missing: {remedy}")
        self.read[name] = value
        return value

    def number(self, name: str, remedy: str) -> int:
        value = self.text(name, remedy)
        try:
            return int(value)
        except ValueError:
            raise PlacementError(f"{name}={value!r} is not a whole number: {remedy}") from None

    def parsed(self, name: str, parse: Callable[[str], _T], remedy: str) -> _T:
        text = self.text(name, remedy)
        try:
            return parse(text)
        except ValueError as error:
            raise PlacementError(f"{name}={text!r} cannot be read ({error}): {remedy}") from None

    def port(self, default: Callable[[], int]) -> int:
        remedy = "set MASTER_PORT to a free TCP port, the same on every rank (for example 29500)"
        port = self.number("MASTER_PORT", remedy) if "MASTER_PORT" in self else default()
        if not 0 < port < 65536:
            raise PlacementError(f"MASTER_PORT={port} is not a TCP port (1 to 65535): {remedy}")
        return port
