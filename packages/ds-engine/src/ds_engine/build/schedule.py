"""From the section `scheduler`, or from what was passed to `initialize`, to a learning-rate schedule."""

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
    """The schedule of a job: the given one, or the configuration's; None for a constant rate.

    Raises:
        ConfigError: a given one that moves the rates of another optimizer.
    """
    if given is None:
        choice = choices.schedule
        return schedules.build(choice.name, choice.params, optimizer) if choice is not None else None
    if hasattr(given, "step") and not inspect.isclass(given):
        schedule: Any = given
        if getattr(schedule, "optimizer", optimizer) is not optimizer:
            raise ConfigError(
                [
                    f"lr_scheduler: this {type(schedule).__name__} moves the rates of another optimizer than the "
                    "engine's, so it would have no effect: pass the optimizer it was made with as optimizer=, or a "
                    "function lr_scheduler=lambda optimizer: ..."
                ]
            )
    else:
        make: Any = given
        schedule = make(optimizer)
    return schedule  # type: ignore[no-any-return]
