"""The section `compression_training`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ds_engine.config.support.section import Count, Names, Positive, Section, Share

Symmetry = Literal["symmetric", "asymmetric"]


class MixedQuantizeConfig(Section):
    """A slow change from fp16 to the quantised values."""

    enabled: bool = Field(default=False, description="Change slowly.")
    quantize_change_ratio: Share = Field(default=0.001, description="Change of the mixture in a step.")


class WeightSharedConfig(Section):
    """What all groups of weights have in common."""

    enabled: bool = Field(default=False, description="Quantise weights.")
    quantizer_kernel: bool = Field(default=False, description="By DeepSpeed's kernel.")
    schedule_offset: Count = Field(default=0, description="Step at which it begins.")
    quantize_groups: Positive = Field(default=1, description="Parts of a tensor with a scale of their own.")
    quantize_verbose: bool = Field(default=False, description="Print changes of bits.")
    quantization_type: Symmetry = Field(default="symmetric", description="Whether there is an offset.")
    quantize_weight_in_forward: bool = Field(default=False, description="In forward, not in the step.")
    rounding: Literal["nearest", "stochastic"] = Field(default="nearest", description="How it rounds.")
    fp16_mixed_quantize: MixedQuantizeConfig = Field(
        default_factory=MixedQuantizeConfig, description="A slow change."
    )


class ActivationSharedConfig(Section):
    """What all groups of activations have in common."""

    enabled: bool = Field(default=False, description="Quantise activations.")
    quantization_type: Symmetry = Field(default="symmetric", description="Whether there is an offset.")
    range_calibration: Literal["dynamic", "static"] = Field(
        default="dynamic", description="How ranges are found."
    )
    schedule_offset: Count = Field(default=1000, description="Step at which it begins.")


class PruningSharedConfig(Section):
    """What all groups of a kind of pruning have in common."""

    enabled: bool = Field(default=False, description="Prune.")
    method: Literal["l1", "topk", "snip_momentum"] = Field(default="l1", description="What is pruned.")
    schedule_offset: Count = Field(default=1000, description="Step at which it begins.")
    schedule_offset_end: Count | None = Field(default=None, description="Step at which it ends.")
    schedule_offset_stride: Positive | None = Field(default=None, description="Steps between two prunings.")
    block_pattern: str | None = Field(default=None, description="Shape of what is pruned at once, as 4x1.")
    dense_ratio: Share | None = Field(default=None, description="Part that stays.")
    excluded_modules: Names | None = Field(default=None, description="Modules that are left alone.")
    num_heads: Positive | None = Field(default=None, description="Heads, for head_pruning.")


class GroupConfig(Section):
    """Modules with settings of their own."""

    params: dict[str, Any] = Field(
        default_factory=dict, description="start_bits, target_bits, bits, dense_ratio, ..."
    )
    modules: Names = Field(default_factory=lambda: ["*"], description="Names of modules.")
    related_modules: list[list[str]] | list[str] | None = Field(
        default=None, description="Modules that are cut to fit."
    )


Groups = dict[str, GroupConfig]


class WeightQuantizationConfig(Section):
    """Weights in few bits."""

    shared_parameters: WeightSharedConfig = Field(
        default_factory=WeightSharedConfig, description="For all groups."
    )
    different_groups: Groups = Field(default_factory=dict, description="Name to group.")


class ActivationQuantizationConfig(Section):
    """Activations in few bits."""

    shared_parameters: ActivationSharedConfig = Field(
        default_factory=ActivationSharedConfig, description="For all groups."
    )
    different_groups: Groups = Field(default_factory=dict, description="Name to group.")


class PruningConfig(Section):
    """Parts of weights that become zero."""

    shared_parameters: PruningSharedConfig = Field(
        default_factory=PruningSharedConfig, description="For all groups."
    )
    different_groups: Groups = Field(default_factory=dict, description="Name to group.")


class LayerReductionConfig(Section):
    """A student with fewer layers."""

    enabled: bool = Field(default=False, description="Reduce.")
    keep_number_layer: Positive | None = Field(default=None, description="Layers of the student.")
    keep_number_layers: Positive | None = Field(default=None, description="The same.")
    module_name_prefix: str | None = Field(default=None, description="Where layers are in the model.")
    teacher_layer: list[Count] | None = Field(default=None, description="Layers that are copied.")
    other_module_name: list[str] | None = Field(default=None, description="Other modules that are copied.")


class CompressionConfig(Section):
    """Quantisation and pruning while training."""

    weight_quantization: WeightQuantizationConfig = Field(
        default_factory=WeightQuantizationConfig, description="Weights in few bits."
    )
    activation_quantization: ActivationQuantizationConfig = Field(
        default_factory=ActivationQuantizationConfig, description="Activations in few bits."
    )
    sparse_pruning: PruningConfig = Field(default_factory=PruningConfig, description="Single elements.")
    row_pruning: PruningConfig = Field(default_factory=PruningConfig, description="Rows.")
    head_pruning: PruningConfig = Field(default_factory=PruningConfig, description="Attention heads.")
    channel_pruning: PruningConfig = Field(default_factory=PruningConfig, description="Channels.")
    layer_reduction: LayerReductionConfig = Field(
        default_factory=LayerReductionConfig, description="A student with fewer layers."
    )
