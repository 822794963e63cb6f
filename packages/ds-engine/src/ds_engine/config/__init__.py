"""`ds_config.json`: typed, frozen, strict."""

from ds_engine.config.load import load
from ds_engine.config.load.source import read
from ds_engine.config.sections.checkpoint import CheckpointConfig
from ds_engine.config.sections.model import DsConfig
from ds_engine.config.sections.optimizer import OptimizerConfig
from ds_engine.config.sections.precision import Bf16Config
from ds_engine.config.sections.scheduler import SchedulerConfig
from ds_engine.config.sections.zero.offload import OffloadOptimizerConfig
from ds_engine.config.sections.zero.optimization import ZeroOptimizationConfig
from ds_engine.config.support.batch import Batch
from ds_engine.config.support.errors import ConfigError

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
