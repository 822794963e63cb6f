"""The native module, or the reason why it is absent."""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["MISSING", "core", "has_native"]

MISSING: str | None = None
"""Why the native module cannot be imported; None if it was imported."""

if TYPE_CHECKING:
    from ds_core import _core as core
else:
    try:
        from ds_core import _core as core
    except ImportError as error:  # e.g. a copy of the sources on a path, never built
        core = None
        MISSING = f"ds_core._core cannot be imported: {error}"


def has_native() -> bool:
    """Whether the compiled CPU kernels are available."""
    return MISSING is None
