"""The section `elasticity`."""

from __future__ import annotations

from pydantic import Field

from ds_engine.config.support.section import Count, NotNegative, Positive, Section


class ElasticityConfig(Section):
    """Batch sizes that many numbers of ranks can keep."""

    enabled: bool = Field(default=False, description="Choose the batch by this section.")
    max_train_batch_size: Positive = Field(default=2000, description="Largest train_batch_size.")
    micro_batch_sizes: list[Positive] = Field(
        default_factory=lambda: [2, 4, 6], description="Micro-batches that fit."
    )
    min_gpus: Positive = Field(default=1, description="Fewest ranks.")
    max_gpus: Positive = Field(default=10000, description="Most ranks.")
    num_gpus_per_node: Positive = Field(default=1, description="Ranks of a machine.")
    model_parallel_size: Positive = Field(default=1, description="Model-parallel ranks.")
    min_time: Count = Field(default=0, description="Minutes a job runs at least.")
    prefer_larger_batch: bool = Field(default=True, description="Take the largest batch that fits.")
    ignore_non_elastic_batch_info: bool = Field(default=False, description="Accept batch sizes beside it.")
    version: NotNegative = Field(default=0.2, description="Of the rules.")
