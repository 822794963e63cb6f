"""The section `autotuning`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ds_engine.config.support.section import Count, Positive, Section


class ModelInfoConfig(Section):
    """What is known of the model before it runs."""

    profile: bool = Field(default=False, description="Measure it.")
    num_params: Count | None = Field(default=None, description="Parameters.")
    hidden_size: Positive | None = Field(default=None, description="Width.")
    num_layers: Positive | None = Field(default=None, description="Depth.")


class AutotuningConfig(Section):
    """Search of stage and micro-batch by short runs."""

    enabled: bool = Field(default=False, description="Search.")
    fast: bool = Field(default=True, description="Vary the micro-batch only.")
    results_dir: str = Field(default="autotuning_results", description="Where results go.")
    exps_dir: str = Field(default="autotuning_exps", description="Where descriptions of the runs go.")
    overwrite: bool = Field(default=True, description="Run again what has results already.")
    metric: Literal["throughput", "latency", "flops"] = Field(
        default="throughput", description="What is made best."
    )
    metric_path: str | None = Field(default=None, description="File of a run with its result.")
    start_profile_step: Positive = Field(default=3, description="First step that is measured.")
    end_profile_step: Positive = Field(default=5, description="Last step that is measured.")
    tuner_type: Literal["gridsearch", "random", "model_based"] = Field(
        default="gridsearch", description="Order in which settings are tried."
    )
    tuner_early_stopping: Positive = Field(
        default=5, description="Runs without a gain before the search ends."
    )
    tuner_num_trials: Positive = Field(default=50, description="Runs at most.")
    arg_mappings: dict[str, Any] | None = Field(
        default=None, description="Key of this file to argument of the script."
    )
    model_info: ModelInfoConfig | None = Field(default=None, description="What is known of the model.")
    model_info_path: str | None = Field(default=None, description="Where that was written.")
    mp_size: Positive = Field(default=1, description="Model-parallel ranks.")
    max_train_batch_size: Positive | None = Field(default=None, description="Largest train_batch_size.")
    min_train_batch_size: Positive = Field(default=1, description="Smallest train_batch_size.")
    max_train_micro_batch_size_per_gpu: Positive = Field(default=1024, description="Largest micro-batch.")
    min_train_micro_batch_size_per_gpu: Positive = Field(default=1, description="Smallest micro-batch.")
    num_tuning_micro_batch_sizes: Positive = Field(default=3, description="Micro-batches that are tried.")
    num_nodes: Positive | None = Field(default=None, description="Machines; the launcher's --num_nodes.")
    num_gpus: Positive | None = Field(
        default=None, description="Devices of a machine; the launcher's --num_gpus."
    )
