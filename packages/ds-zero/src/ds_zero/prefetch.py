"""Which unit comes next, learnt from the previous pass."""

from __future__ import annotations


class Order:
    """The sequence of units in one kind of pass (forward or backward)."""

    def __init__(self) -> None:
        self._previous: list[str] = []
        self._current: list[str] = []
        self._followed = True

    def enter(self, unit: str) -> str | None:
        """Note that `unit` runs now; the unit to fetch ahead, or None where the previous pass gives no
        answer.
        """
        position = len(self._current)
        self._current.append(unit)
        self._followed = (
            self._followed and position < len(self._previous) and self._previous[position] == unit
        )
        return self._previous[position + 1] if self._followed and position + 1 < len(self._previous) else None

    def is_last(self, unit: str) -> bool:
        """Whether the previous pass ended with `unit`."""
        return bool(self._previous) and self._previous[-1] == unit

    def end(self) -> None:
        """The pass is over; a pass that left the old order replaces it."""
        if self._current:
            self._previous = self._current
        self._current, self._followed = [], True
