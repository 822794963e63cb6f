"""Watches calls of torch.distributed's functions for ranks that wait too long."""

from __future__ import annotations

import os

from torch import nn

from ds_comm.stalls import StallWatch, watch_stalls
from ds_engine.config import DsConfig
from ds_engine.interfaces import World


def watch_of(settings: DsConfig, model: nn.Module, world: World) -> StallWatch | None:
    """Starts the watch of the section `stall_reports`; None: there is none. Collective."""
    section = settings.stall_reports
    enabled = "DS_LAUNCHER" in os.environ if section.enabled is None else section.enabled
    if not enabled or world.world_size == 1:
        return None
    return watch_stalls(model, timeout_s=section.timeout_s)
