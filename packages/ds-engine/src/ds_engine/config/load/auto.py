"""The meaning of an "auto" that no integration has replaced.

Accelerate and Transformers replace "auto" by values from their own arguments before `initialize`. An "auto" that
remains stands for the default. Where a default would be a guess, it is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu")
_MUST: dict[str, str] = {
    "zero_optimization": f"set it to an object {...}, or remove it",
    "zero_optimization.stage": "set it to 0, 1, 2 or 3",
    "scheduler.params.total_num_steps": "set it to the number of optimizer steps of the run",
    "scheduler.params.cycle_min_lr": "set it to the lowest learning rate",
    "scheduler.params.cycle_max_lr": "set it to the highest learning rate",
}


def unfilled(config: Any) -> Iterator[str]:
    """Yields a sentence for each "auto" that needs a value."""
    autos = config.origin.autos
    for path in autos:
        if path in _MUST:
            yield f'{path} is "auto", and no integration has replaced it: {_MUST[path]}'
    sizes_needed = not config.elasticity.enabled and all(getattr(config, name) is None for name in _BATCH)
    if sizes_needed and any(name in autos for name in _BATCH):
        yield (
            f'{" and ".join(name for name in _BATCH if name in autos)}: "auto", and no integration has replaced it. '
            "Accelerate and the Trainer do; without them, set one of the two"
        )


def defaults(config: Any) -> list[str]:
    """Returns the paths with "auto" that stand for their default."""
    return [path for path in config.origin.autos if path not in _MUST and path not in _BATCH]
