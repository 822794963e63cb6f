"""`ds_config.json`: typed, frozen, strict."""

from ds_engine.config.batch import Batch
from ds_engine.config.checkpoint import CheckpointConfig
from ds_engine.config.errors import ConfigError
from ds_engine.config.load import load
from ds_engine.config.model import DsConfig
from ds_engine.config.offload import OffloadOptimizerConfig
from ds_engine.config.optimizer import OptimizerConfig
from ds_engine.config.precision import Bf16Config
from ds_engine.config.scheduler import SchedulerConfig
from ds_engine.config.source import read
from ds_engine.config.zero import ZeroOptimizationConfig

__all__ = [
    "Batch",
    "Bf16Config",
    "CheckpointConfig",
    "ConfigError",
    "DsConfig",
    "OffloadOptimizerConfig",
    "OptimizerConfig",
    "SchedulerConfig",
    "ZeroOptimizationConfig",
    "load",
    "read",
]
