"""Sizes for people."""

from __future__ import annotations


def human_bytes(num_bytes: float) -> str:
    """Like 12.3 MiB; powers of 1024, as memory is sold and as budgets are given."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
