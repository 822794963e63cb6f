"""The section `data_efficiency`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_engine.config.sections.data.curriculum import CurriculumConfig
from ds_engine.config.support.section import Count, Positive, Section


class DynamicBatchingConfig(Section):
    """Batches of about equal numbers of tokens, and a rate that follows their size."""

    enabled: bool = Field(default=False, description="Vary the batch.")
    metrics_path: str | None = Field(
        default=None,
        description="Folder in which the analyzer has written the measure seqlen, the lengths of samples.",
    )
    lr_scaling_method: Literal["linear", "sqrt", "none"] = Field(
        default="linear", description="How the rate follows the size of the batch."
    )
    min_batch_size: Positive = Field(
        default=1, description="Samples that are packed together at least; fewer are left out."
    )
    max_batch_size: Positive | None = Field(
        default=None, description="Samples that are packed together at most."
    )
    sequence_picking_order: Literal["dataloader", "random", "seqlen"] = Field(
        default="dataloader", description="Order of samples."
    )
    max_tokens: Positive | None = Field(
        default=None,
        description="Tokens that samples are packed into; train_batch_size such lists make a step. Has to be given.",
    )
    verbose: bool = Field(default=False, description="Print how many batches there are, and their sizes.")


class DataSamplingConfig(Section):
    """Which samples are drawn."""

    enabled: bool = Field(default=False, description="Draw by the sections below.")
    num_epochs: Positive = Field(default=1000, description="Passes over the data at most.")
    num_workers: Count = Field(default=0, description="Processes that load.")
    pin_memory: bool = Field(default=False, description="Load into page-locked memory.")
    curriculum_learning: CurriculumConfig = Field(
        default_factory=CurriculumConfig, description="Easy samples first."
    )
    dynamic_batching: DynamicBatchingConfig = Field(
        default_factory=DynamicBatchingConfig, description="Batches of about equal numbers of tokens."
    )


class RandomLtdScheduleConfig(Section):
    """Numbers of a growing length."""

    require_steps: Positive | None = Field(default=None, description="Steps until all tokens are kept.")
    seq_per_step: Positive | None = Field(default=None, description="Lengths are multiples of this.")


class RandomLtdGrowthConfig(Section):
    """How many tokens the layers keep."""

    min_value: Positive | None = Field(default=None, description="At the beginning.")
    max_value: Positive | None = Field(default=None, description="At the end.")
    schedule_type: Literal["fixed_linear"] = Field(default="fixed_linear", description="How it grows.")
    schedule_config: RandomLtdScheduleConfig = Field(
        default_factory=RandomLtdScheduleConfig, description="Numbers of the schedule."
    )


class LayerTokenLrConfig(Section):
    """A rate that follows the tokens that layers see."""

    enabled: bool = Field(default=False, description="Follow them.")
    total_layer_tokens: Positive | None = Field(default=None, description="Tokens times layers in all.")
    warmup_type: Literal["linear", "log"] | None = Field(default=None, description="How the rate rises.")
    warmup_layer_tokens: Positive | None = Field(default=None, description="Until when it rises.")


class RandomLtdConfig(Section):
    """Random layer-wise token dropping."""

    enabled: bool = Field(default=False, description="Drop tokens.")
    total_layer_num: Positive | None = Field(default=None, description="Layers of the model.")
    random_ltd_layer_num: Positive | None = Field(default=None, description="Layers that drop.")
    random_ltd_layer_id: list[Count] | None = Field(default=None, description="Which ones.")
    model_mask_name: str | None = Field(default=None, description="Argument of the layer that is the mask.")
    model_type: Literal["encoder", "decoder"] | None = Field(default=None, description="Kind of model.")
    micro_batch_size: Positive | None = Field(default=None, description="Taken from the batch sizes.")
    global_batch_size: Positive | None = Field(default=None, description="Taken from the batch sizes.")
    hidden_state_order: Literal["batch_seq_dim", "seq_batch_dim"] | None = Field(
        default=None, description="Order of the first two dims."
    )
    random_ltd_schedule: RandomLtdGrowthConfig = Field(
        default_factory=RandomLtdGrowthConfig, description="How many tokens are kept."
    )
    layer_token_lr_schedule: LayerTokenLrConfig = Field(
        default_factory=LayerTokenLrConfig, description="A rate that follows them."
    )


class DataRoutingConfig(Section):
    """Which tokens pass through which layers."""

    enabled: bool = Field(default=False, description="Route by the section below.")
    random_ltd: RandomLtdConfig = Field(default_factory=RandomLtdConfig, description="Token dropping.")


class DataEfficiencyConfig(Section):
    """Choice of samples and tokens."""

    enabled: bool = Field(default=False, description="Choose by the sections below.")
    seed: Count = Field(default=1234, description="Of the order of samples.")
    data_sampling: DataSamplingConfig = Field(
        default_factory=DataSamplingConfig, description="Which samples are drawn."
    )
    data_routing: DataRoutingConfig = Field(
        default_factory=DataRoutingConfig, description="Which tokens pass through which layers."
    )
