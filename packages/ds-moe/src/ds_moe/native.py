"""The native kernels of ds_core, where that package is installed."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType


@functools.cache
def _module(name: str) -> ModuleType | None:
    """Returns a module of ds_core; None if that package is not installed, or has no such module."""
    try:
        return importlib.import_module(f"ds_core.{name}")
    except ModuleNotFoundError:
        return None


def grouped() -> ModuleType | None:
    """Returns the module with linear layers of many experts; None without ds_core."""
    return _module("grouped")


def grouped_feed_forward() -> ModuleType | None:
    """Returns the module with feed-forward blocks of many experts; None without ds_core."""
    return _module("grouped_feed_forward")


def row_sums() -> ModuleType | None:
    """Returns the module with sums of rows; None without ds_core."""
    return _module("row_sums")
