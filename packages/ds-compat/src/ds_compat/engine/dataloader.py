"""random-LTD by DeepSpeed's function; loaders are the engine's."""

from __future__ import annotations

from typing import Any

from ds_engine.build.data import Loader as DeepSpeedDataLoader
from ds_engine.build.data import RepeatingLoader

__all__ = ["DeepSpeedDataLoader", "RepeatingLoader", "convert_to_random_ltd"]


def convert_to_random_ltd(model: Any, convert_type: type[Any]) -> Any:
    """Drop tokens around the layers of a class; the engine `model` itself stays as it is."""
    model._engine.pacing.drop_tokens(model.module, convert_type)
    return model
