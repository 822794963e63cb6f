"""Builds the learning-rate schedule from the section `scheduler` or the argument of `initialize`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from ds_engine import schedules
from ds_engine.config.support.errors import ConfigError
from ds_engine.job.choices import Choices
from ds_engine.schedules import LRSchedule


def schedule_of(
    choices: Choices, given: LRSchedule | Callable[[Optimizer], LRSchedule] | None, optimizer: Optimizer
) -> LRSchedule | None:
    """Returns the schedule of a job: the passed or the configured one; None for a constant rate.

    Raises:
        ConfigError: the passed schedule belongs to another optimizer.
    """
    if given is None:
        choice = choices.schedule
        return schedules.build(choice.name, choice.params, optimizer) if choice is not None else None
    if hasattr(given, "step") and not inspect.isclass(given):
        schedule: Any = given
        if getattr(schedule, "optimizer", optimizer) is not optimizer:
            raise ConfigError(
                [
                    f"lr_scheduler: this {type(schedule).__name__} sets the learning rates of another optimizer "
                    "than the engine's, so it would have no effect: pass its optimizer as optimizer=, or pass a "
                    "function lr_scheduler=lambda optimizer: ..."
                ]
            )
    else:
        make: Any = given
        schedule = make(optimizer)
    return schedule  # type: ignore[no-any-return]
