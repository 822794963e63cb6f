"""Where the values of a configuration came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, eq=False)
class Origin:
    """How a configuration was read. Two configurations with the same values are equal whatever their origin."""

    where: str = "config"
    """Path of the file, or "config" for a dict."""
    raw: Mapping[str, Any] = field(default_factory=dict)
    """What was read, before names were mapped and defaults filled in."""
    lines: Mapping[str, int] = field(default_factory=dict)
    """Dotted path, as written -> line of the file."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Path as written -> path that it means."""
    autos: tuple[str, ...] = ()
    """Paths with the value "auto", which nothing has filled in."""
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Paths that older configurations have and that never had an effect -> why."""

    def line(self, path: str) -> int | None:
        """Line on which `path`, or the nearest section around it, was written."""
        return self._nearest(self._as_written(path))

    def _as_written(self, path: str) -> str:
        """The path in the names of the file."""
        for old, new in self.renamed.items():
            if path == new or path.startswith(f"{new}."):
                return old + path[len(new) :]
        return path

    def _nearest(self, path: str) -> int | None:
        while path:
            if path in self.lines:
                return self.lines[path]
            path = path.rpartition(".")[0]
        return None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin)

    def __hash__(self) -> int:
        return 0
