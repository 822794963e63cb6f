"""Models that are initialised again.

The original makes a second engine over the same model, and code drops or forgets the first. Here one engine owns the
model's parameters, so the next `deepspeed.initialize` takes it away from the one before.
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
"""Model -> weak reference to the engine that it was given last."""


def note(model: nn.Module, engine: DeepSpeedEngine) -> None:
    """`engine` is the model's engine from here on; it is not kept alive."""
    _engine_of[model] = weakref.ref(engine)


def release(model: nn.Module) -> None:
    """Make a model that has an engine, or had one that was dropped, an ordinary one again. Collective then."""
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
