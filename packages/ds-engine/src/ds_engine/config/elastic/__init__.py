"""Elastic batch sizes: one train_batch_size that many numbers of ranks can share, so that a job may grow or shrink."""

from ds_engine.config.elastic.batch import ElasticBatch, Limits, choose
from ds_engine.config.elastic.errors import (
    ElasticityConfigError,
    ElasticityError,
    ElasticityIncompatibleWorldSize,
)

__all__ = [
    "ElasticBatch",
    "ElasticityConfigError",
    "ElasticityError",
    "ElasticityIncompatibleWorldSize",
    "Limits",
    "choose",
]
