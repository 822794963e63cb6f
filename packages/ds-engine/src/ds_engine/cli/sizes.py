"""Sizes as people write them."""

from __future__ import annotations

import re
from collections.abc import Mapping

_UNITS: Mapping[str, int] = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 10 ** (3 * n) for n, prefix in enumerate("kmgt", 1)},
    **{f"{prefix}ib": 2 ** (10 * n) for n, prefix in enumerate("kmgt", 1)},
}


def parse_bytes(text: str) -> int:
    """`24GiB`, `80 GB` or `1e9` as a number of bytes.

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*(?:e[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is no size: write it like 24GiB, 80GB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2]])
