"""Formatting of sizes."""

from __future__ import annotations


def human_bytes(num_bytes: float) -> str:
    """Formats bytes in powers of 1024, for example 12.3 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
