"""The section `data_efficiency`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_engine.config.sections.data.curriculum import CurriculumConfig
from ds_engine.config.support.section import Count, Positive, Section


class DynamicBatchingConfig(Section):
    """Batches with about equal numbers of tokens, and a learning rate that follows the batch size."""

    enabled: bool = Field(default=False, description="Packs samples into batches by their number of tokens.")
    metrics_path: str | None = Field(
        default=None,
        description='Directory in which ds_engine.sampling.Analyzer wrote the measure "seqlen", the length of '
        "each sample in tokens. Required. Default: none.",
    )
    lr_scaling_method: Literal["linear", "sqrt", "none"] = Field(
        default="linear", description="How the learning rate follows the batch size."
    )
    min_batch_size: Positive = Field(
        default=1, description="Minimum number of samples in a pack; samples of smaller packs are dropped."
    )
    max_batch_size: Positive | None = Field(
        default=None, description="Maximum number of samples in a pack. Default: no limit."
    )
    sequence_picking_order: Literal["dataloader", "random", "seqlen"] = Field(
        default="dataloader", description="Order in which samples are packed."
    )
    max_tokens: Positive | None = Field(
        default=None,
        description="Maximum number of tokens in a pack; one step takes train_batch_size packs. Required. "
        "Default: none.",
    )
    verbose: bool = Field(default=False, description="Prints the number of batches and their sizes.")


class DataSamplingConfig(Section):
    """Which samples are drawn."""

    enabled: bool = Field(
        default=False, description="Draws samples by the sections curriculum_learning and dynamic_batching."
    )
    num_epochs: Positive = Field(default=1000, description="Maximum number of passes over the data.")
    num_workers: Count = Field(default=0, description="Number of processes that load samples.")
    pin_memory: bool = Field(default=False, description="Loads samples into page-locked host memory.")
    curriculum_learning: CurriculumConfig = Field(
        default_factory=CurriculumConfig, description="A curriculum of samples by their difficulty."
    )
    dynamic_batching: DynamicBatchingConfig = Field(
        default_factory=DynamicBatchingConfig, description="Batches with about equal numbers of tokens."
    )


class RandomLtdScheduleConfig(Section):
    """Numbers of the schedule by which the kept length grows."""

    require_steps: Positive | None = Field(
        default=None,
        description="Number of training steps after which all tokens are kept. Required. Default: none.",
    )
    seq_per_step: Positive | None = Field(
        default=None,
        description="Kept lengths are multiples of this number of tokens. Required. Default: none.",
    )


class RandomLtdGrowthConfig(Section):
    """How many tokens the dropping layers keep."""

    min_value: Positive | None = Field(
        default=None,
        description="Number of tokens kept at the first step. Required. Default: none.",
    )
    max_value: Positive | None = Field(
        default=None,
        description="Number of tokens kept at the end of the schedule. Required. Default: none.",
    )
    schedule_type: Literal["fixed_linear"] = Field(
        default="fixed_linear", description="Function by which the number of kept tokens grows."
    )
    schedule_config: RandomLtdScheduleConfig = Field(
        default_factory=RandomLtdScheduleConfig, description="Numbers of the schedule."
    )


class LayerTokenLrConfig(Section):
    """A learning rate that follows the number of tokens that the layers have processed."""

    enabled: bool = Field(
        default=False, description="Lets the learning rate follow the number of processed tokens."
    )
    total_layer_tokens: Positive | None = Field(
        default=None, description="Total number of tokens times layers of the run. Default: none."
    )
    warmup_type: Literal["linear", "log"] | None = Field(
        default=None, description="Function by which the learning rate rises. Default: none."
    )
    warmup_layer_tokens: Positive | None = Field(
        default=None, description="Number of tokens times layers after which the warm-up ends. Default: none."
    )


class RandomLtdConfig(Section):
    """Random layer-wise token dropping: some layers process a random part of the tokens."""

    enabled: bool = Field(default=False, description="Drops tokens.")
    total_layer_num: Positive | None = Field(
        default=None,
        description="Number of layers of the model; an error is raised if it has others. Default: not checked.",
    )
    random_ltd_layer_num: Positive | None = Field(
        default=None,
        description="Number of layers that drop tokens; it must match random_ltd_layer_id. Default: the "
        "length of that list.",
    )
    random_ltd_layer_id: list[Count] | None = Field(
        default=None,
        description="Indices of the layers that drop tokens, from 0. Required. Default: none.",
    )
    model_mask_name: str | None = Field(
        default=None,
        description="Name of the layer's argument that holds the attention mask. Default: the layers take no "
        "mask.",
    )
    model_type: Literal["encoder", "decoder"] | None = Field(
        default=None, description="Whether the model is an encoder or a decoder. Default: unset."
    )
    micro_batch_size: Positive | None = Field(
        default=None, description="Micro-batch size. Default: that of the job."
    )
    global_batch_size: Positive | None = Field(
        default=None, description="Batch size. Default: that of the job."
    )
    hidden_state_order: Literal["batch_seq_dim", "seq_batch_dim"] | None = Field(
        default=None,
        description="Order of the first two dimensions of hidden states. Default: batch_seq_dim.",
    )
    random_ltd_schedule: RandomLtdGrowthConfig = Field(
        default_factory=RandomLtdGrowthConfig, description="How many tokens the dropping layers keep."
    )
    layer_token_lr_schedule: LayerTokenLrConfig = Field(
        default_factory=LayerTokenLrConfig,
        description="A learning rate that follows the number of processed tokens.",
    )


class DataRoutingConfig(Section):
    """Which tokens pass through which layers."""

    enabled: bool = Field(default=False, description="Applies the section random_ltd.")
    random_ltd: RandomLtdConfig = Field(
        default_factory=RandomLtdConfig, description="Random layer-wise token dropping."
    )


class DataEfficiencyConfig(Section):
    """Choice of samples, batches and tokens."""

    enabled: bool = Field(default=False, description="Applies the sections data_sampling and data_routing.")
    seed: Count = Field(default=1234, description="Seed of the order of the samples.")
    data_sampling: DataSamplingConfig = Field(
        default_factory=DataSamplingConfig, description="Which samples are drawn."
    )
    data_routing: DataRoutingConfig = Field(
        default_factory=DataRoutingConfig, description="Which tokens pass through which layers."
    )
