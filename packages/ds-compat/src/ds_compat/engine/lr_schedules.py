"""`deepspeed.runtime.lr_schedules`: the schedules of ds_engine, their names, and their command-line arguments."""

from __future__ import annotations

from typing import Any

import ds_engine.schedules
from ds_compat.ops.optimizers import InstanceOfBase
from ds_compat.utils.logs import logger
from ds_engine.schedules import LRRangeTest, OneCycle, add_tuning_arguments, get_config_from_args
from ds_engine.schedules.arguments import ARGUMENTS, SETTINGS

__all__ = [
    "LRRangeTest",
    "OneCycle",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
    "add_tuning_arguments",
    "get_config_from_args",
]

LR_SCHEDULE = "lr_schedule"
LR_RANGE_TEST, ONE_CYCLE = "LRRangeTest", "OneCycle"
WARMUP_LR, WARMUP_DECAY_LR, WARMUP_COSINE_LR = "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"
VALID_LR_SCHEDULES = list(SETTINGS)
WARMUP_LOG_RATE, WARMUP_LINEAR_RATE = "log", "linear"


def _known_type(arguments: dict[str, Any]) -> dict[str, Any]:
    """Replaces an unknown `warmup_type` by "log", with a warning, as in DeepSpeed."""
    kind = arguments.get("warmup_type", WARMUP_LOG_RATE)
    if kind in (WARMUP_LOG_RATE, WARMUP_LINEAR_RATE):
        return arguments
    logger.warning(f"warmup_type {kind!r} is unknown; using {WARMUP_LOG_RATE!r}")
    return {**arguments, "warmup_type": WARMUP_LOG_RATE}


class WarmupLR(ds_engine.schedules.WarmupLR, metaclass=InstanceOfBase):
    """See `ds_engine.schedules.WarmupLR`."""

    def __init__(self, optimizer: Any, *args: Any, **arguments: Any) -> None:
        super().__init__(optimizer, *args, **_known_type(arguments))


class WarmupDecayLR(ds_engine.schedules.WarmupDecayLR, metaclass=InstanceOfBase):
    """See `ds_engine.schedules.WarmupDecayLR`."""

    def __init__(self, optimizer: Any, *args: Any, **arguments: Any) -> None:
        super().__init__(optimizer, *args, **_known_type(arguments))


class WarmupCosineLR(ds_engine.schedules.WarmupCosineLR, metaclass=InstanceOfBase):
    """See `ds_engine.schedules.WarmupCosineLR`."""

    def __init__(self, optimizer: Any, *args: Any, **arguments: Any) -> None:
        super().__init__(optimizer, *args, **_known_type(arguments))


# DeepSpeed has a constant for each name of an argument: WARMUP_MIN_LR = "warmup_min_lr", and so on.
globals().update({name.upper(): name for name in (*ARGUMENTS, "edge_value", "mid_value")})


def get_lr_from_config(config: dict[str, Any]) -> tuple[Any, str]:
    """Returns (the initial learning rate of a schedule's section, or None; a message)."""
    name, values = config.get("type"), config.get("params")
    if name is None or values is None:
        return None, "LR schedule type or params are missing"
    if name not in VALID_LR_SCHEDULES:
        return None, f"{name} is not a valid LR schedule"
    keys = {LR_RANGE_TEST: "lr_range_test_min_lr", ONE_CYCLE: "cycle_max_lr"}
    return values.get(keys.get(name, "warmup_max_lr")), ""
