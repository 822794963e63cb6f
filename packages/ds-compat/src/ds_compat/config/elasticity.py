"""`deepspeed.elasticity`, on top of ds_engine's elastic batch sizes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ds_compat.utils.logs import logger
from ds_engine.config import ConfigError
from ds_engine.config.elastic import ElasticityConfigError, ElasticityError, ElasticityIncompatibleWorldSize
from ds_engine.config.elastic.batch import ALIKE, BY_MACHINES
from ds_engine.config.elastic.section import elastic_batch
from ds_engine.config.load.loader import accept, examine
from ds_engine.config.load.source import open_source

if TYPE_CHECKING:
    from ds_engine.config import DsConfig

ELASTICITY, ENABLED, ENABLED_DEFAULT = "elasticity", "enabled", False
DEEPSPEED_ELASTICITY_CONFIG = "DEEPSPEED_ELASTICITY_CONFIG"
"""Environment variable with the section as the scheduler knows it, in JSON."""
MINIMUM_DEEPSPEED_VERSION = "0.3.8"
LATEST_ELASTICITY_VERSION = BY_MACHINES
MAX_ACCEPTABLE_BATCH_SIZE, MICRO_BATCHES, VERSION = "max_train_batch_size", "micro_batch_sizes", "version"
MIN_GPUS, MAX_GPUS, NUM_GPUS_PER_NODE = "min_gpus", "max_gpus", "num_gpus_per_node"
MODEL_PARALLEL_SIZE, MIN_TIME, PREFER_LARGER_BATCH = "model_parallel_size", "min_time", "prefer_larger_batch"
IGNORE_NON_ELASTIC_BATCH_INFO = "ignore_non_elastic_batch_info"
_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

__all__ = [
    "ElasticityConfigError",
    "ElasticityError",
    "ElasticityIncompatibleWorldSize",
    "compute_elastic_config",
    "elasticity_enabled",
    "ensure_immutable_elastic_config",
]


def elasticity_enabled(ds_config: Mapping[str, Any]) -> bool:
    """Whether the section exists and is switched on."""
    section = ds_config.get(ELASTICITY)
    return bool(section.get(ENABLED, ENABLED_DEFAULT)) if isinstance(section, Mapping) else False


def compute_elastic_config(
    ds_config: Mapping[str, Any],
    target_deepspeed_version: str | None = None,
    world_size: int = 0,
    return_microbatch: bool = False,
) -> tuple[Any, ...]:
    """Chooses the batch of the section `elasticity`.

    Args:
        ds_config: a configuration as a dict; only the section is read.
        target_deepspeed_version: refused below 0.3.8. None: not checked.
        world_size: number of ranks, model-parallel ones included. 0: the environment variable WORLD_SIZE if the
            micro-batch or a batch of version 0.2 is asked for.
        return_microbatch: whether the micro-batch for this number of ranks is returned, too. It always is with
            `world_size`.

    Returns:
        (train_batch_size, numbers of data-parallel ranks that suit it), and then the micro-batch size if asked for.

    Raises:
        ElasticityConfigError: the section is missing, disabled or contains mistakes, or the number of ranks is unknown.
        ElasticityIncompatibleWorldSize: no allowed batch can be divided among this number of ranks.
    """
    if not isinstance(ds_config, Mapping):
        raise ValueError(f"ds_config is a {type(ds_config).__name__}: pass the configuration as a dict")
    if ELASTICITY not in ds_config:
        raise ElasticityConfigError(['the section "elasticity" is missing: add it for an elastic job'])
    if not elasticity_enabled(ds_config):
        raise ElasticityConfigError(["elasticity.enabled is not true: set it for an elastic job"])
    _check_version(target_deepspeed_version)
    section = _checked({ELASTICITY: ds_config[ELASTICITY]}).elasticity
    num = world_size
    if num <= 0 and (return_microbatch or section.version != ALIKE):
        num = _world_size_of_environment(section.version)
    if num <= 0:
        chosen = elastic_batch(section)
        return chosen.train, list(chosen.ranks)
    ranks, rest = divmod(num, section.model_parallel_size)
    if rest:
        raise ElasticityIncompatibleWorldSize(
            [
                f"{num} ranks cannot be divided into model-parallel groups of elasticity.model_parallel_size "
                f"{section.model_parallel_size}: start a multiple of it"
            ]
        )
    chosen = elastic_batch(section, ranks)
    if world_size <= 0 and not return_microbatch:
        return chosen.train, list(chosen.ranks)
    return chosen.train, list(chosen.ranks), chosen.on(ranks).micro


def check_of_job(ds_config: Mapping[str, Any]) -> None:
    """Checks the section before a job starts; a configuration without it passes.

    Raises:
        ElasticityConfigError: the section or the batch sizes beside it are wrong, or the scheduler knows another
            section.
    """
    if elasticity_enabled(ds_config):
        _checked({key: ds_config[key] for key in (ELASTICITY, *_SIZES) if key in ds_config})
        ensure_immutable_elastic_config(ds_config[ELASTICITY], quiet=True)


def ensure_immutable_elastic_config(
    runtime_elastic_config_dict: Mapping[str, Any], quiet: bool = False
) -> None:
    """Compares the section with that in the environment variable DEEPSPEED_ELASTICITY_CONFIG, with which a scheduler
    has chosen the number of ranks.

    Args:
        quiet: without the variable, do not warn that nothing can be compared.

    Raises:
        ElasticityConfigError: the two choose different batches, or the variable does not contain a section.
    """
    text = os.environ.get(DEEPSPEED_ELASTICITY_CONFIG)
    if text is None:
        if not quiet:
            logger.warning(
                f"the environment variable {DEEPSPEED_ELASTICITY_CONFIG} is not set, so the section elasticity cannot "
                "be compared with that of the scheduler"
            )
        return
    try:
        section = json.loads(text)
    except ValueError as error:
        raise ElasticityConfigError(
            [f"{DEEPSPEED_ELASTICITY_CONFIG} is not JSON ({error}): set it to the section elasticity"]
        ) from None
    theirs = _checked({ELASTICITY: section}, DEEPSPEED_ELASTICITY_CONFIG).elasticity
    ours = _checked({ELASTICITY: dict(runtime_elastic_config_dict)}).elasticity
    differing = [
        f"{name} is {getattr(theirs, name)} in {DEEPSPEED_ELASTICITY_CONFIG} and {getattr(ours, name)} in the job"
        for name in (MAX_ACCEPTABLE_BATCH_SIZE, MICRO_BATCHES, VERSION)
        if getattr(theirs, name) != getattr(ours, name)
    ]
    if differing:
        raise ElasticityConfigError([f"elasticity: {'; '.join(differing)}: use the same section in both"])


def _checked(raw: Mapping[str, Any], where: str = "") -> DsConfig:
    """Reads a configuration that contains little but the section; mistakes in it raise ElasticityConfigError."""
    section = raw[ELASTICITY]
    if isinstance(section, Mapping) and isinstance(section.get(VERSION), str):
        raw = {**raw, ELASTICITY: {**section, VERSION: _number(section[VERSION])}}
    try:
        return accept(examine(open_source(raw)))
    except ConfigError as error:
        where = f"{where}: " if where else ""
        raise ElasticityConfigError([f"{where}{problem}" for problem in error.problems]) from None


def _number(version: str) -> float | str:
    """DeepSpeed reads a version from a text, too."""
    try:
        return float(version)
    except ValueError:
        return version


def _check_version(target: str | None) -> None:
    if target is None:
        return
    numbers = [int(number) for number in re.findall(r"\d+", target)[:3]]
    if numbers < [int(number) for number in MINIMUM_DEEPSPEED_VERSION.split(".")]:
        raise ElasticityError(
            [f"DeepSpeed {target} has no elastic batch sizes: they need {MINIMUM_DEEPSPEED_VERSION} or newer"]
        )


def _world_size_of_environment(version: float) -> int:
    text = os.environ.get("WORLD_SIZE", "")
    if not text.isdecimal() or int(text) < 1:
        raise ElasticityConfigError(
            [
                f"elasticity.version {version:g} needs the number of ranks: pass world_size=N, or set the environment "
                f"variable WORLD_SIZE (now {text!r})"
            ]
        )
    return int(text)
