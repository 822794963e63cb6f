"""The whole configuration: `ds_config.json` as a typed value."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ds_engine.config.batch import Batch, resolve
from ds_engine.config.checkpoint import CheckpointConfig
from ds_engine.config.optimizer import OptimizerConfig
from ds_engine.config.precision import Bf16Config
from ds_engine.config.scheduler import SchedulerConfig
from ds_engine.config.section import Count, Positive, Section
from ds_engine.config.zero import ZeroOptimizationConfig


class DsConfig(Section):
    """Top level of `ds_config.json`. Read it with `ds_engine.config.load`, which explains mistakes better
    than this class does.
    """

    train_batch_size: Positive | None = Field(
        default=None,
        description="Samples per optimizer step over all ranks: train_micro_batch_size_per_gpu x "
        "gradient_accumulation_steps x ranks. "
        "Any one or two of the three may be left out, except that gradient_accumulation_steps alone is not "
        "enough.",
    )
    train_micro_batch_size_per_gpu: Positive | None = Field(
        default=None, description="Samples per forward pass on one rank."
    )
    gradient_accumulation_steps: Positive | None = Field(
        default=None, description="Micro-batches per optimizer step. Default: 1, or what the other two give."
    )
    optimizer: OptimizerConfig | None = Field(
        default=None, description="Built when none is passed to initialize()."
    )
    scheduler: SchedulerConfig | None = Field(
        default=None, description="Built when none is passed to initialize(). Default: a constant rate."
    )
    bf16: Bf16Config = Field(default_factory=Bf16Config, description="Mixed precision in bfloat16.")
    zero_optimization: ZeroOptimizationConfig = Field(
        default_factory=ZeroOptimizationConfig, description="How the model is divided among ranks."
    )
    gradient_clipping: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=1.0,
        description="Largest global 2-norm of the gradient; a larger gradient is scaled down to it. 0 turns "
        "it off.",
    )
    steps_per_print: Count | None = Field(
        default=None,
        description="Optimizer steps between two lines of progress on rank 0. Default, and 0: none.",
    )
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="What is kept on disk."
    )
    seed: Count | None = Field(
        default=None,
        description="Seeds the random generators of every rank (differently) and the order of training_data. "
        "Default: generators are left alone, and the order is that of seed 0.",
    )
    startup_summary: bool = Field(
        default=True, description="Print on rank 0 what was chosen, and why, and what each rank holds."
    )

    def batch(self, world_size: int) -> Batch:
        """The three batch sizes for a number of ranks; ConfigError shows the equation where they contradict
        each other.
        """
        return resolve(
            self.train_batch_size,
            self.train_micro_batch_size_per_gpu,
            self.gradient_accumulation_steps,
            world_size,
        )
