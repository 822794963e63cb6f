"""Where in the user's code a thread is."""

from __future__ import annotations

import sys
import types


def module_of(frame: types.FrameType) -> str:
    """Returns the name of the module whose code a frame executes."""
    return str(frame.f_globals.get("__name__", ""))


def _is_library(package: str) -> bool:
    return package in ("torch", "threading", "contextlib") or package.startswith("ds_")


def place_of(thread_id: int) -> str:
    """Returns the line of the user's code at which a thread is."""
    frame = sys._current_frames().get(thread_id)
    inner = frame
    while frame is not None and _is_library(module_of(frame).partition(".")[0]):
        frame = frame.f_back
    frame = frame or inner
    if frame is None:
        return "an unknown place"
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
