"""Parses sizes with units."""

from __future__ import annotations

import re
from collections.abc import Mapping

_UNITS: Mapping[str, int] = {
    "b": 1,
    **{f"{prefix}{ending}": 10 ** (3 * n) for n, prefix in enumerate("kmgt", 1) for ending in ("", "b")},
    **{f"{prefix}i{ending}": 2 ** (10 * n) for n, prefix in enumerate("kmgt", 1) for ending in ("", "b")},
}


def parse_bytes(text: str) -> int:
    """Converts `80G`, `80GB` (powers of 1000) or `80GiB` (powers of 1024) to a number of bytes.

    Raises:
        ValueError: anything else, including a number without a unit, which could be bytes or gigabytes.
    """
    match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*(?:e[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    if match is not None and not match[2]:
        raise ValueError(f"{text.strip()!r} has no unit: write {match[1]}GiB, {match[1]}GB or {match[1]}B")
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is not a size: write for example 80GiB, 80GB or 80G")
    return int(float(match[1]) * _UNITS[match[2]])
