"""What becomes of "auto" where no integration has filled it in.

Accelerate and Transformers replace "auto" by values from their own arguments before `initialize` sees it. What is left
takes its default, or, where a default would be a guess about the job, is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu")
_MUST: dict[str, str] = {
    "zero_optimization": "give an object {...}, or remove it",
    "zero_optimization.stage": "give 0, 1, 2 or 3",
    "scheduler.params.total_num_steps": "give the number of optimizer steps of the run",
    "scheduler.params.cycle_min_lr": "give the lowest rate",
    "scheduler.params.cycle_max_lr": "give the highest rate",
}


def unfilled(config: Any) -> Iterator[str]:
    """A sentence for each "auto" that has to be a value."""
    autos = config.origin.autos
    for path in autos:
        if path in _MUST:
            yield f'{path} is "auto", and no integration has filled it in: {_MUST[path]}'
    if all(getattr(config, name) is None for name in _BATCH) and any(name in autos for name in _BATCH):
        yield (
            f'{" and ".join(name for name in _BATCH if name in autos)}: "auto", and no integration has filled it in. '
            "Accelerate and Trainer do; without them, give one of the two"
        )


def defaults(config: Any) -> list[str]:
    """Paths of "auto" that have taken their default."""
    return [path for path in config.origin.autos if path not in _MUST and path not in _BATCH]
