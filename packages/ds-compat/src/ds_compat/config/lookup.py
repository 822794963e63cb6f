"""Settings by their dotted path."""

from __future__ import annotations

import functools
from typing import Any

_ABSENT = object()


def find(config: Any, raw: Any, path: str, default: Any) -> Any:
    """Returns the value at a dotted path of the typed configuration, else of the dict, else `default`."""
    for root, step in ((config, lambda at, key: getattr(at, key, _ABSENT)), (raw, _item)):
        try:
            value = functools.reduce(step, path.split("."), root)
        except (AttributeError, TypeError):
            continue
        if value is not _ABSENT and value is not None:
            return value
    return default


def _item(at: Any, key: str) -> Any:
    return at.get(key, _ABSENT) if isinstance(at, dict) else _ABSENT
