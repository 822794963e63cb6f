"""Learning-rate schedules."""

from ds_engine.schedules.arguments import add_tuning_arguments, get_config_from_args, override_params
from ds_engine.schedules.base import LRSchedule, Schedule
from ds_engine.schedules.build import OWN, build, check
from ds_engine.schedules.one_cycle import OneCycle
from ds_engine.schedules.range_test import LRRangeTest
from ds_engine.schedules.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR

__all__ = [
    "OWN",
    "LRRangeTest",
    "LRSchedule",
    "OneCycle",
    "Schedule",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
    "add_tuning_arguments",
    "build",
    "check",
    "get_config_from_args",
    "override_params",
]
