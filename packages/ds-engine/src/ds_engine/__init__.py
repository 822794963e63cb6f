"""Training with ZeRO, offload and safe checkpoints from a `ds_config.json`.

Names are imported on first use, so that `import ds_engine` (and the command `ds`, which imports it) is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_engine import checkpoint, config, schedules
    from ds_engine.assemble import initialize
    from ds_engine.checkpoint import CheckpointError
    from ds_engine.config.support.errors import ConfigError
    from ds_engine.engine import Engine
    from ds_engine.inference.engine import InferenceEngine, init_inference
    from ds_engine.pipeline_engine import PipelineEngine

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Engine",
    "InferenceEngine",
    "PipelineEngine",
    "__version__",
    "checkpoint",
    "config",
    "init_inference",
    "initialize",
    "schedules",
]

_HOMES = {
    "CheckpointError": "ds_engine.checkpoint",
    "ConfigError": "ds_engine.config.support.errors",
    "Engine": "ds_engine.engine",
    "InferenceEngine": "ds_engine.inference",
    "PipelineEngine": "ds_engine.pipeline_engine",
    "init_inference": "ds_engine.inference",
    "initialize": "ds_engine.assemble",
}
_MODULES = frozenset({"checkpoint", "config", "schedules"})


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"ds_engine.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ds_engine' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
