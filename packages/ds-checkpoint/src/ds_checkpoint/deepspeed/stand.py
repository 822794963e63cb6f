"""A placeholder for an object whose class was not imported."""

from __future__ import annotations

from typing import Any


class Stand:
    """Placeholder for an object whose class was not imported, or for that class or function itself."""

    __slots__ = ("args", "called", "cls", "items", "pairs", "state")

    def __init__(self, cls: str) -> None:
        self.cls = cls
        """Module and name of the class or function."""
        self.called = False
        """Whether this is a placeholder for an object of the class rather than for the class."""
        self.args: tuple[Any, ...] = ()
        """The arguments of its constructor."""
        self.state: dict[Any, Any] = {}
        """Its attributes."""
        self.items: list[Any] = []
        """The items that were appended to it, if it is a subclass of list or set."""
        self.pairs: list[tuple[Any, Any]] = []
        """The pairs that were put into it, if it is a subclass of dict."""

    def fill(self, state: Any) -> None:
        """Sets the attributes that a pickle assigns."""
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.state.update(part)

    def __repr__(self) -> str:
        return f"<{self.cls}>"
