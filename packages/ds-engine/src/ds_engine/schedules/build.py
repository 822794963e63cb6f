"""Builds a schedule from the section `scheduler`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer

from ds_engine.config.support.errors import ConfigError
from ds_engine.config.support.suggest import did_you_mean
from ds_engine.schedules.base import LRSchedule, Schedule
from ds_engine.schedules.one_cycle import OneCycle
from ds_engine.schedules.range_test import LRRangeTest
from ds_engine.schedules.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR

OWN: Mapping[str, Callable[..., Schedule]] = {
    "LRRangeTest": LRRangeTest,
    "OneCycle": OneCycle,
    "WarmupLR": WarmupLR,
    "WarmupDecayLR": WarmupDecayLR,
    "WarmupCosineLR": WarmupCosineLR,
}


def check(name: str, params: Mapping[str, Any]) -> list[str]:
    """Returns mistakes in a section `scheduler`, before there is an optimizer: in type and names of arguments."""
    try:
        schedule_class = _find(name)
    except ConfigError as error:
        return list(error.problems)
    known = {
        key: value
        for key, value in inspect.signature(schedule_class).parameters.items()
        if key not in ("self", "optimizer")
    }
    wrong = [
        f"scheduler.params.{key}: {schedule_class.__name__} has no such argument.{did_you_mean(key, known)}"
        for key in params
        if key not in known
    ]
    return wrong + [
        f"scheduler.params.{key} is missing: it is required by {schedule_class.__name__}"
        for key, value in known.items()
        if value.default is inspect.Parameter.empty and key not in params
    ]


def build(name: str, params: Mapping[str, Any], optimizer: Optimizer) -> LRSchedule:
    """Builds the schedule that the section `scheduler` names.

    Raises:
        ConfigError: there is no such schedule, it does not have an argument, or it refuses a value.
    """
    schedule_class = _find(name)
    wrong = check(name, params)
    if wrong:
        raise ConfigError(wrong)
    try:
        schedule: LRSchedule = schedule_class(optimizer, **params)
    except (TypeError, ValueError) as error:
        raise ConfigError([f"scheduler.params for {schedule_class.__name__}: {error}"]) from error
    return schedule


def _find(name: str) -> Any:
    own = {key.lower(): value for key, value in OWN.items()}
    if name.lower() in own:
        return own[name.lower()]
    # torch's schedules, which are searched only if none of ours matches.
    from torch.optim import lr_scheduler

    # ReduceLROnPlateau's step needs a metric, which the engine does not have.
    theirs = {
        key: value
        for key, value in vars(lr_scheduler).items()
        if isinstance(value, type) and issubclass(value, lr_scheduler.LRScheduler) and not key.startswith("_")
        if key not in ("LRScheduler", "ReduceLROnPlateau")
    }
    for key, value in theirs.items():
        if key.lower() == name.lower():
            return value
    raise ConfigError(
        [f'scheduler.type is "{name}": there is no such schedule.{did_you_mean(name, [*OWN, *theirs])}']
    )
