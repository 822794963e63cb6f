"""Models that are passed to `deepspeed.initialize` again.

In DeepSpeed a model may have several engines, of which code uses the last one. Here an engine owns the model's
parameters, so `deepspeed.initialize` first destroys the previous engine of a model.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

import ds_zero
from ds_compat.utils.logs import logger

if TYPE_CHECKING:
    from ds_compat.engine.engine import DeepSpeedEngine

_engine_of: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Model -> weak reference to its last engine."""


def note(model: nn.Module, engine: DeepSpeedEngine) -> None:
    """Records `engine` as the model's engine, without keeping it alive."""
    _engine_of[model] = weakref.ref(engine)


def release(model: nn.Module) -> None:
    """Undoes the sharding of a model by an earlier engine, if there was one. Collective in that case."""
    pointer = _engine_of.pop(model, None)
    if pointer is None or not any(ds_zero.presence(p) is not None for p in model.parameters()):
        return
    engine = pointer()
    if engine is None:
        ds_zero.destroy(model)
        return
    logger.warning(
        f"this {type(model).__name__} has an engine already, which deepspeed.initialize destroys: use the new one"
    )
    engine.destroy()
