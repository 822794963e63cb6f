"""Makes the order of samples from the section `data_efficiency`."""

from __future__ import annotations

import warnings

from ds_engine.config.sections.data.data_efficiency import DataSamplingConfig
from ds_engine.config.sections.model import DsConfig
from ds_engine.config.support.batch import Batch
from ds_engine.config.support.errors import ConfigError
from ds_engine.sampling.curriculum import Criterion, CurriculumOrder
from ds_engine.sampling.index import open_index, open_values
from ds_engine.sampling.order import Order
from ds_engine.sampling.tokens import Packing, Scaling, TokenBatches
from ds_engine.training.pacing import schedule

_WHERE = "data_efficiency.data_sampling"


def sampling_of(config: DsConfig) -> DataSamplingConfig | None:
    """Returns the section `data_sampling` if it is enabled."""
    section = config.data_efficiency
    return section.data_sampling if section.enabled and section.data_sampling.enabled else None


def lr_scaling_of(config: DsConfig) -> Scaling:
    """Returns how learning rates follow the number of samples of a step, if batches differ in size."""
    sampling = sampling_of(config)
    return (
        sampling.dynamic_batching.lr_scaling_method
        if sampling and sampling.dynamic_batching.enabled
        else "none"
    )


def order_of(
    config: DsConfig, batch: Batch, rank: int, num_samples: int | None, indexed: bool
) -> Order | None:
    """Returns the order of `training_data`; None: the default order.

    Args:
        rank: index of this rank on the data-parallel axis.
        num_samples: number of samples; None: there is no data set.
        indexed: whether samples can be accessed by index.

    Raises:
        ConfigError: a required setting or file is missing, contradicts another, or belongs to another data set.
    """
    sampling = sampling_of(config)
    if sampling is None or not (sampling.curriculum_learning.enabled or sampling.dynamic_batching.enabled):
        return None
    if num_samples is None:
        warnings.warn(
            f"{_WHERE} has no effect without training_data: pass the data set to initialize(), or use "
            "ds_engine.sampling with a loader of your own",
            stacklevel=4,
        )
        return None
    if not indexed:
        raise ConfigError(
            [
                f"{_WHERE} chooses samples by index, but training_data is an IterableDataset: pass a "
                "data set with __getitem__ and __len__"
            ]
        )
    try:
        if sampling.dynamic_batching.enabled:
            return _by_tokens(config, sampling, batch, rank, num_samples)
        return _by_difficulty(config, sampling, batch, rank, num_samples)
    except (FileNotFoundError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError([f"{_WHERE}: {error}"]) from error


def _by_tokens(
    config: DsConfig, sampling: DataSamplingConfig, batch: Batch, rank: int, num_samples: int
) -> TokenBatches:
    section = sampling.dynamic_batching
    assert section.metrics_path is not None and section.max_tokens is not None  # combinations.py
    lengths = open_values(section.metrics_path, "seqlen")
    if len(lengths) != num_samples:
        raise ValueError(
            f"{section.metrics_path} has the lengths of {len(lengths)} samples, but training_data has {num_samples}"
        )
    packing = Packing(
        max_tokens=section.max_tokens,
        min_samples=section.min_batch_size,
        max_samples=section.max_batch_size,
        picking=section.sequence_picking_order,
    )
    return TokenBatches(
        lengths,
        packing,
        batch=batch.train,
        micro_batch=batch.micro,
        rank=rank,
        ranks=batch.ranks,
        seed=config.data_efficiency.seed,
    )


def _by_difficulty(
    config: DsConfig, sampling: DataSamplingConfig, batch: Batch, rank: int, num_samples: int
) -> CurriculumOrder:
    criteria = {}
    for name, section in sampling.curriculum_learning.curriculum_metrics.items():
        restricts = section.clustering_type == "schedule_based"
        path = section.index_to_sample_path
        assert path is not None or not restricts  # combinations.py
        where = f"{_WHERE}.curriculum_learning.curriculum_metrics.{name}"
        criteria[name] = Criterion(
            difficulty=schedule(section, where),
            most=section.max_difficulty or 100,
            kind=section.difficulty_type,
            index=open_index(path, section.index_to_metric_path) if restricts and path is not None else None,
        )
    return CurriculumOrder(
        num_samples,
        criteria,
        batch=batch.train,
        micro_batch=batch.micro,
        rank=rank,
        ranks=batch.ranks,
        seed=config.data_efficiency.seed,
        passes=sampling.num_epochs,
    )
