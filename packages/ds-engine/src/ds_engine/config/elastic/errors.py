"""The errors of elastic batch sizes, under DeepSpeed's names."""

from __future__ import annotations

from ds_engine.config.support.errors import ConfigError


class ElasticityError(ConfigError):
    """Base class of the errors of the section `elasticity`."""


class ElasticityConfigError(ElasticityError):
    """The section contains a mistake, or the batch sizes beside it contradict it."""


class ElasticityIncompatibleWorldSize(ElasticityError):
    """The job has a number of ranks among which no allowed batch can be divided."""
