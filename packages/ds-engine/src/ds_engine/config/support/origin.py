"""The origin of the values of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, eq=False)
class Origin:
    """How a configuration was read. It compares equal to any other origin, so that configurations are compared by
    their values.
    """

    where: str = "config"
    """Path of the file, or "config" for a dict."""
    raw: Mapping[str, Any] = field(default_factory=dict)
    """The content before names were mapped and defaults added."""
    lines: Mapping[str, int] = field(default_factory=dict)
    """Dotted path as written -> line of the file."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Path as written -> current path."""
    autos: tuple[str, ...] = ()
    """Paths with the value "auto" that no integration has replaced."""
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Paths in older configurations that never had an effect -> reason."""

    def line(self, path: str) -> int | None:
        """Returns the line of `path`, or of the nearest section around it."""
        return self._nearest(self._as_written(path))

    def _as_written(self, path: str) -> str:
        """Returns the path with the names of the file."""
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
