"""The attribute `monitor` of the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_compat.engine.engine import DeepSpeedEngine


class _Silent:
    """A monitor that writes nothing."""

    enabled = False

    def write_events(self, event_list: Any) -> None:
        """Does nothing."""


def monitor(engine: DeepSpeedEngine) -> Any:
    """Returns the engine's monitor, or one that writes nothing."""
    return getattr(engine._engine, "monitor", None) or _Silent()
