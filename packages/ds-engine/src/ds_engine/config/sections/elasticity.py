"""The section `elasticity`."""

from __future__ import annotations

from pydantic import Field

from ds_engine.config.support.section import Count, NotNegative, Positive, Section


class ElasticityConfig(Section):
    """Batch sizes that stay the same on many numbers of ranks, so that a job may lose or gain some."""

    enabled: bool = Field(
        default=False,
        description="Computes the batch sizes from this section: the batch of at most max_train_batch_size samples "
        "that can be divided among the most numbers of ranks.",
    )
    max_train_batch_size: Positive = Field(
        default=2000,
        description="Largest train_batch_size that may be chosen, in samples. Required with enabled.",
    )
    micro_batch_sizes: list[Positive] = Field(
        default_factory=lambda: [2, 4, 6],
        description="Micro-batch sizes that fit into memory, in samples per rank. Required with enabled.",
    )
    min_gpus: Positive = Field(
        default=1, description="Smallest number of ranks that the batch size has to suit."
    )
    max_gpus: Positive = Field(
        default=10000, description="Largest number of ranks that the batch size has to suit."
    )
    num_gpus_per_node: Positive = Field(
        default=1, description="Number of ranks per machine. Version 0.2 chooses a batch for whole machines."
    )
    model_parallel_size: Positive = Field(
        default=1, description="Number of ranks that work on the same samples. More than 1 needs version 0.2."
    )
    min_time: Count = Field(default=0, description="Minimum run time of a job, in minutes.")
    prefer_larger_batch: bool = Field(
        default=True,
        description="Chooses the larger of two batch sizes that suit equally many numbers of ranks, instead of the "
        "smaller.",
    )
    ignore_non_elastic_batch_info: bool = Field(
        default=False, description="Accepts batch sizes outside of this section and ignores them."
    )
    version: NotNegative = Field(
        default=0.2,
        description="Version of the rules. 0.1 refuses a number of ranks that the batch does not suit. 0.2 suits whole "
        "machines, and gives every other number of ranks a batch of its own, so that the batch size changes with it.",
    )
