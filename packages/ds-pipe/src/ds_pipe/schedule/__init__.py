"""Schedules: pure functions that return the actions of all ranks as a value."""

from ds_pipe.schedule.lowering import (
    lower,
    merged_backwards,
    with_communication,
    with_reduction,
    with_unshard,
)
from ds_pipe.schedule.names import NAMES, TRAINING, make, stages_per_rank
from ds_pipe.schedule.schedule import Schedule, check
from ds_pipe.schedule.zero_bubble import zero_bubble

__all__ = [
    "NAMES",
    "TRAINING",
    "Schedule",
    "check",
    "lower",
    "make",
    "merged_backwards",
    "stages_per_rank",
    "with_communication",
    "with_reduction",
    "with_unshard",
    "zero_bubble",
]
