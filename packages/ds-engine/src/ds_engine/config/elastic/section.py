"""What the section `elasticity` means for the batch sizes of a job."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ds_engine.config.elastic.batch import ALIKE, BY_MACHINES, VERSIONS, ElasticBatch, Limits, choose
from ds_engine.config.support.batch import MICRO, STEPS, TRAIN, Batch

if TYPE_CHECKING:
    from ds_engine.config.sections.elasticity import ElasticityConfig


def limits_of(section: ElasticityConfig) -> Limits:
    """Returns the values of a section in which `mistakes` finds nothing."""
    return Limits(
        max_batch=section.max_train_batch_size,
        micro_batches=tuple(section.micro_batch_sizes),
        min_ranks=section.min_gpus,
        max_ranks=section.max_gpus,
        prefer_larger=section.prefer_larger_batch,
        ranks_per_node=section.num_gpus_per_node,
        model_parallel=section.model_parallel_size,
        version=section.version,
    )


def elastic_batch(section: ElasticityConfig, ranks: int | None = None) -> ElasticBatch:
    """Returns the batch of the section; arguments and errors as for `choose`."""
    return choose(limits_of(section), ranks)


def batch_on(section: ElasticityConfig, ranks: int) -> Batch:
    """Returns the batch sizes for a number of data-parallel ranks; errors as for `choose`."""
    return elastic_batch(section, ranks).on(ranks)


def mistakes(config: Any) -> Iterator[tuple[str, str]]:
    """Yields key and sentence for each value of the section that is wrong beside another one.

    Args:
        config: a `DsConfig`.
    """
    section: ElasticityConfig = config.elasticity
    if not section.enabled:
        return
    for name in ("max_train_batch_size", "micro_batch_sizes"):
        if name not in section.model_fields_set:
            yield (
                f"elasticity.{name}",
                f"elasticity.{name} is missing: set it, because no default suits every model",
            )
    yield from _wrong_sizes(section)
    yield from _wrong_version(section)
    beside = [key for key in (TRAIN, MICRO, STEPS) if getattr(config, key) is not None]
    if beside and not section.ignore_non_elastic_batch_info:
        yield (
            beside[0],
            f"elasticity.enabled chooses the batch sizes, and {' and '.join(beside)} contradict(s) it: remove "
            f"{'it' if len(beside) == 1 else 'them'}, or set elasticity.ignore_non_elastic_batch_info to true",
        )


def _wrong_sizes(section: ElasticityConfig) -> Iterator[tuple[str, str]]:
    if not section.micro_batch_sizes:
        yield "elasticity.micro_batch_sizes", "elasticity.micro_batch_sizes is empty: name at least one size"
    large = [size for size in section.micro_batch_sizes if size > section.max_train_batch_size]
    if large:
        yield (
            "elasticity.micro_batch_sizes",
            f"elasticity.micro_batch_sizes contains {', '.join(map(str, large))}, more than max_train_batch_size "
            f"{section.max_train_batch_size}: remove it, or raise the limit",
        )


def _wrong_version(section: ElasticityConfig) -> Iterator[tuple[str, str]]:
    model_parallel, per_node = section.model_parallel_size, section.num_gpus_per_node
    if section.version not in VERSIONS:
        yield (
            "elasticity.version",
            f"elasticity.version is {section.version:g}: it must be {ALIKE:g} or {BY_MACHINES:g}",
        )
    elif section.version == ALIKE and model_parallel > 1:
        yield (
            "elasticity.model_parallel_size",
            f"elasticity.model_parallel_size {model_parallel} needs elasticity.version {BY_MACHINES:g}",
        )
    elif section.version == BY_MACHINES and per_node % model_parallel:
        yield (
            "elasticity.num_gpus_per_node",
            f"elasticity.num_gpus_per_node {per_node} must be a multiple of model_parallel_size {model_parallel}: the "
            "ranks of a model-parallel group are on one machine",
        )
