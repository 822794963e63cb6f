"""The section `autotuning`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ds_engine.config.support.section import Count, Positive, Section


class ModelInfoConfig(Section):
    """What is known about the model before it runs."""

    profile: bool = Field(
        default=False, description="Measures the model in a run of its own before the search."
    )
    num_params: Count | None = Field(
        default=None, description="Number of parameters of the model. Default: counted."
    )
    hidden_size: Positive | None = Field(
        default=None, description="Hidden size of the model. Default: unknown."
    )
    num_layers: Positive | None = Field(
        default=None, description="Number of layers of the model. Default: unknown."
    )


class AutotuningConfig(Section):
    """A search for the ZeRO stage and the micro-batch size by short training runs."""

    enabled: bool = Field(default=False, description="Runs the search.")
    fast: bool = Field(default=True, description="Varies the micro-batch size only.")
    results_dir: str = Field(
        default="autotuning_results", description="Directory for the results of the runs."
    )
    exps_dir: str = Field(
        default="autotuning_exps", description="Directory for the configurations of the runs."
    )
    overwrite: bool = Field(default=True, description="Repeats runs whose results exist already.")
    metric: Literal["throughput", "latency", "flops"] = Field(
        default="throughput", description='Quantity that the search maximises, or minimises for "latency".'
    )
    metric_path: str | None = Field(
        default=None,
        description="File to which a run writes the value of the metric. Default: the engine writes it.",
    )
    start_profile_step: Positive = Field(
        default=3, description="First training step that is measured in each run."
    )
    end_profile_step: Positive = Field(
        default=5, description="Last training step that is measured in each run."
    )
    tuner_type: Literal["gridsearch", "random", "model_based"] = Field(
        default="gridsearch", description="Order in which settings are tried."
    )
    tuner_early_stopping: Positive = Field(
        default=5, description="Number of runs without an improvement after which the search ends."
    )
    tuner_num_trials: Positive = Field(default=50, description="Maximum number of runs.")
    arg_mappings: dict[str, Any] | None = Field(
        default=None,
        description="Maps keys of this file to command-line arguments of the training script. Default: no "
        "arguments are changed.",
    )
    model_info: ModelInfoConfig | None = Field(
        default=None, description="What is known about the model. Default: nothing."
    )
    model_info_path: str | None = Field(
        default=None,
        description="File with the result of an earlier measurement of the model. Default: none.",
    )
    mp_size: Positive = Field(default=1, description="Number of model-parallel ranks.")
    max_train_batch_size: Positive | None = Field(
        default=None, description="Largest train_batch_size that is tried. Default: no limit."
    )
    min_train_batch_size: Positive = Field(default=1, description="Smallest train_batch_size that is tried.")
    max_train_micro_batch_size_per_gpu: Positive = Field(
        default=1024, description="Largest micro-batch size that is tried, in samples per rank."
    )
    min_train_micro_batch_size_per_gpu: Positive = Field(
        default=1, description="Smallest micro-batch size that is tried, in samples per rank."
    )
    num_tuning_micro_batch_sizes: Positive = Field(
        default=3, description="Number of micro-batch sizes that are tried."
    )
    num_nodes: Positive | None = Field(
        default=None,
        description="Number of machines, as the launcher's --num_nodes. Default: the launcher's.",
    )
    num_gpus: Positive | None = Field(
        default=None,
        description="Number of devices per machine, as the launcher's --num_gpus. Default: the launcher's.",
    )
