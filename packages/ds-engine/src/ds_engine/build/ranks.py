"""Starts the process group of the job."""

from __future__ import annotations

import ds_comm
from ds_engine.interfaces import World


def start() -> World:
    """Initialises the process group, unless there is one. All ranks must call it."""
    return ds_comm.start()
