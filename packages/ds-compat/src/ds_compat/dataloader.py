"""`RepeatingLoader`; the loader of `training_data` and `deepspeed_io` is the engine's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ds_engine.data import Loader as DeepSpeedDataLoader

__all__ = ["DeepSpeedDataLoader", "RepeatingLoader"]


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
