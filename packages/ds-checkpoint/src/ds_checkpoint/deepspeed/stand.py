"""What stands for an object of a class that was not imported."""

from __future__ import annotations

from typing import Any


class Stand:
    """Stands for an object of a class that was not imported, or for that class or function itself."""

    __slots__ = ("args", "called", "cls", "items", "pairs", "state")

    def __init__(self, cls: str) -> None:
        self.cls = cls
        """Module and name of the class or function."""
        self.called = False
        """Whether this stands for an object of the class, and not for the class."""
        self.args: tuple[Any, ...] = ()
        """What it was to be constructed from."""
        self.state: dict[Any, Any] = {}
        """Its attributes."""
        self.items: list[Any] = []
        """What was appended to it, where it is a list or a set by another name."""
        self.pairs: list[tuple[Any, Any]] = []
        """What was put into it, where it is a dict by another name."""

    def fill(self, state: Any) -> None:
        """Take over the attributes that a pickle gives it."""
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.state.update(part)

    def __repr__(self) -> str:
        return f"<{self.cls}>"
