"""`RepeatingLoader` and random-LTD; the loader of `training_data` and `deepspeed_io` is the engine's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ds_engine.data import Loader as DeepSpeedDataLoader

__all__ = ["DeepSpeedDataLoader", "RepeatingLoader", "convert_to_random_ltd"]


def convert_to_random_ltd(model: Any, convert_type: type[Any]) -> Any:
    """Drop tokens around the layers of a class; the engine `model` itself stays as it is."""
    model._engine.pacing.drop_tokens(model.module, convert_type)
    return model


class RepeatingLoader:
    """An iterator over a loader that begins again at its end."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.data_iter: Iterator[Any] = iter(loader)

    def __iter__(self) -> RepeatingLoader:
        return self

    def __next__(self) -> Any:
        try:
            return next(self.data_iter)
        except StopIteration:
            self.data_iter = iter(self.loader)
            return next(self.data_iter)

    def __len__(self) -> int:
        """Of one pass."""
        return len(self.loader)  # type: ignore[arg-type]
