"""`DeepSpeedConfig` and its sections, on top of ds_engine's configuration."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import ds_engine.config
from ds_compat.config.adapted import adapted
from ds_compat.config.elasticity import check_of_job
from ds_compat.config.sections import DeepSpeedZeroConfig
from ds_engine.config import Batch, ConfigError, DsConfig
from ds_engine.config.elastic import ElasticityError
from ds_engine.config.load import source
from ds_engine.config.support import batch

ADAM_OPTIMIZER, ADAMW_OPTIMIZER, LAMB_OPTIMIZER = "adam", "adamw", "lamb"
ADAGRAD_OPTIMIZER, LION_OPTIMIZER, SGD_OPTIMIZER, MUON_OPTIMIZER = "adagrad", "lion", "sgd", "muon"
GRADIENT_CLIPPING, GRADIENT_CLIPPING_DEFAULT = "gradient_clipping", 1.0
LOG_LEVEL, LOG_LEVEL_DEFAULT = "log_level", None
TRAIN_BATCH_SIZE = "train_batch_size"
TRAIN_MICRO_BATCH_SIZE_PER_GPU = "train_micro_batch_size_per_gpu"
GRADIENT_ACCUMULATION_STEPS = "gradient_accumulation_steps"
ROUTE_TRAIN, ROUTE_EVAL, ROUTE_PREDICT = "train", "eval", "predict"
TORCH_DISTRIBUTED_DEFAULT_PORT = 29500


class ZeRORuntimeException(Exception):
    """The error that DeepSpeed raises for incompatible ZeRO settings."""


class DeepSpeedConfigError(ConfigError, AssertionError, ZeRORuntimeException):
    """A mistake in the configuration. It derives from all errors that DeepSpeed raises for one."""

    def __init__(self, error: ConfigError) -> None:
        self.problems = error.problems
        Exception.__init__(self, *error.args)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Context manager that converts configuration errors to DeepSpeedConfigError, except those of the section
    elasticity, which have DeepSpeed's names already.
    """
    try:
        yield
    except ElasticityError:
        raise
    except ConfigError as error:
        raise DeepSpeedConfigError(error) from error


class _ZeroConfig(DeepSpeedZeroConfig, extra="ignore"):
    """Ignores keys of ds_engine that DeepSpeed lacks."""


_PATHS: Mapping[str, str] = {
    "zero_optimization_stage": "zero_optimization.stage",
    "fp16_enabled": "fp16.enabled",
    "bfloat16_enabled": "bf16.enabled",
}


class DeepSpeedConfig:
    """A configuration with attributes, which is checked as in `deepspeed.initialize`.

    Args:
        config: a dict, the path of a file, or JSON in URL-safe base64.
        mpu: object whose data-parallel world size determines the batch sizes.
    """

    def __init__(self, config: Any, mpu: Any = None, mesh_device: Any = None) -> None:
        self.world_size = _world_size(mpu)
        with told():
            self.raw = read(config)
            self._param_dict = self.raw
            check_of_job(self.raw)
            self.typed: DsConfig = ds_engine.config.load(adapted(self.raw), foreign_keys=True)
            if mpu is None:
                shared = self.typed.tensor_parallel.ranks * (self.typed.sequence_parallel_size or 1)
                self.world_size = max(1, self.world_size // shared)  # the engine refuses other numbers
            self.take_batch(self.typed.batch(self.world_size))

    def take_batch(self, sizes: Batch) -> None:
        """Sets the three batch sizes."""
        self.train_batch_size: int | None = sizes.train
        self.train_micro_batch_size_per_gpu: int | None = sizes.micro
        self.gradient_accumulation_steps: int | None = sizes.steps

    def _configure_train_batch_size(self) -> None:
        """Computes the batch sizes that are None."""
        with told():
            sizes = (
                self.train_batch_size,
                self.train_micro_batch_size_per_gpu,
                self.gradient_accumulation_steps,
            )
            self.take_batch(batch.resolve(*sizes, self.world_size))

    @property
    def zero_config(self) -> DeepSpeedZeroConfig:
        given = self.raw.get("zero_optimization")
        return _ZeroConfig(
            **(given if isinstance(given, dict) else {"stage": self.typed.zero_optimization.stage})
        )

    @property
    def zero_enabled(self) -> bool:
        return self.typed.zero_optimization.stage > 0

    @property
    def optimizer_name(self) -> str | None:
        return self.typed.optimizer.type.lower() if self.typed.optimizer is not None else None

    @property
    def optimizer_params(self) -> dict[str, Any] | None:
        return dict(self.typed.optimizer.params) if self.typed.optimizer is not None else None

    @property
    def scheduler_name(self) -> str | None:
        return self.typed.scheduler.type if self.typed.scheduler is not None else None

    @property
    def scheduler_params(self) -> dict[str, Any] | None:
        return dict(self.typed.scheduler.params) if self.typed.scheduler is not None else None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("raw", "typed"):
            raise AttributeError(name)
        from ds_compat.config.lookup import find

        marker = object()
        value = find(self.typed, self.raw, _PATHS.get(name, name), marker)
        if value is marker:
            raise AttributeError(f"DeepSpeedConfig has no setting {name!r}")
        return value

    def print(self, name: str = "DeepSpeedConfig") -> None:
        from ds_compat.utils.logs import logger

        logger.info(f"{name}:\n{json.dumps(self.raw, indent=4, default=str)}")


def _world_size(mpu: Any) -> int:
    from ds_compat.comm import groups

    return int(mpu.get_data_parallel_world_size()) if mpu is not None else groups._size()


def read(config: Any) -> dict[str, Any]:
    """Returns a dict from any form that DeepSpeed accepts: a dict, the path of a file, or JSON in base64.

    Raises:
        FileNotFoundError, ConfigError: it has none of these forms.
    """
    if isinstance(config, dict):
        return config
    if not isinstance(config, (str, os.PathLike)):
        raise ValueError(
            "Expected a string path to an existing deepspeed config, or a dictionary or a valid base64. Received: "
            f"{config}"
        )
    return source.read(config)


def dict_raise_error_on_duplicate_keys(ordered_pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads(object_pairs_hook=...): ValueError for a key that is given twice."""
    settings = dict(ordered_pairs)
    if len(settings) != len(ordered_pairs):
        keys = [key for key, _ in ordered_pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"Duplicate keys in DeepSpeed config: {twice}")
    return settings


def get_gradient_clipping(param_dict: Mapping[str, Any]) -> float:
    return float(param_dict.get(GRADIENT_CLIPPING, GRADIENT_CLIPPING_DEFAULT))


def get_scalar_param(param_dict: Mapping[str, Any], param_name: str, param_default_value: Any) -> Any:
    return param_dict.get(param_name, param_default_value)


def get_log_level(param_dict: Mapping[str, Any]) -> Any:
    return param_dict.get(LOG_LEVEL, LOG_LEVEL_DEFAULT)
