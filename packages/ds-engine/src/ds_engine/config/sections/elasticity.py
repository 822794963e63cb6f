"""The section `elasticity`."""

from __future__ import annotations

from pydantic import Field

from ds_engine.config.support.section import Count, NotNegative, Positive, Section


class ElasticityConfig(Section):
    """Batch sizes that stay the same on many numbers of ranks."""

    enabled: bool = Field(default=False, description="Computes the batch sizes from this section.")
    max_train_batch_size: Positive = Field(
        default=2000, description="Largest train_batch_size that may be chosen, in samples."
    )
    micro_batch_sizes: list[Positive] = Field(
        default_factory=lambda: [2, 4, 6],
        description="Micro-batch sizes that fit into memory, in samples per rank.",
    )
    min_gpus: Positive = Field(
        default=1, description="Smallest number of ranks that the batch size has to suit."
    )
    max_gpus: Positive = Field(
        default=10000, description="Largest number of ranks that the batch size has to suit."
    )
    num_gpus_per_node: Positive = Field(default=1, description="Number of ranks per machine.")
    model_parallel_size: Positive = Field(default=1, description="Number of model-parallel ranks.")
    min_time: Count = Field(default=0, description="Minimum run time of a job, in minutes.")
    prefer_larger_batch: bool = Field(
        default=True, description="Chooses the largest batch size that suits, instead of the smallest."
    )
    ignore_non_elastic_batch_info: bool = Field(
        default=False, description="Accepts batch sizes outside of this section and ignores them."
    )
    version: NotNegative = Field(default=0.2, description="Version of the rules that choose the batch size.")
