"""Says why ranks wait for each other: which rank, in which collective, at which line."""

from ds_comm.stalls.calls import Call, Position
from ds_comm.stalls.explain import explain
from ds_comm.stalls.watch import StallWatch, watch_stalls

__all__ = ["Call", "Position", "StallWatch", "explain", "watch_stalls"]
