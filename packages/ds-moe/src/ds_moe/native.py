"""The native kernels of ds_core, where that package is installed."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType


@functools.cache
def grouped() -> ModuleType | None:
    """Returns the module with linear layers of many experts; None without ds_core."""
    try:
        from ds_core import grouped as module
    except ModuleNotFoundError:
        return None
    return module


@functools.cache
def grouped_feed_forward() -> ModuleType | None:
    """Returns the module with feed-forward blocks of many experts; None without ds_core."""
    try:
        from ds_core import grouped_feed_forward as module
    except ModuleNotFoundError:
        return None
    return module


@functools.cache
def row_sums() -> ModuleType | None:
    """Returns the module with sums of rows; None without ds_core."""
    try:
        from ds_core import row_sums as module
    except ModuleNotFoundError:
        return None
    return module
