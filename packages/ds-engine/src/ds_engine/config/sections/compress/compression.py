"""The section `compression_training`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ds_engine.config.support.section import Count, Names, Positive, Section, Share

Symmetry = Literal["symmetric", "asymmetric"]


class MixedQuantizeConfig(Section):
    """A gradual change from fp16 values to quantised values."""

    enabled: bool = Field(default=False, description="Mixes fp16 values and quantised values at the start.")
    quantize_change_ratio: Share = Field(
        default=0.001, description="Fraction of the mixture that changes to quantised values in each step."
    )


class WeightSharedConfig(Section):
    """Settings that all groups of weights share."""

    enabled: bool = Field(default=False, description="Quantises weights.")
    quantizer_kernel: bool = Field(default=False, description="Quantises with DeepSpeed's CUDA kernel.")
    schedule_offset: Count = Field(default=0, description="Training step at which quantisation starts.")
    quantize_groups: Positive = Field(
        default=1, description="Number of parts of a tensor that have a scale of their own."
    )
    quantize_verbose: bool = Field(default=False, description="Prints each change of the number of bits.")
    quantization_type: Symmetry = Field(
        default="symmetric", description='"symmetric" has a scale only, "asymmetric" an offset too.'
    )
    quantize_weight_in_forward: bool = Field(
        default=False, description="Quantises weights in forward instead of after the optimizer step."
    )
    rounding: Literal["nearest", "stochastic"] = Field(
        default="nearest", description="How values are rounded."
    )
    fp16_mixed_quantize: MixedQuantizeConfig = Field(
        default_factory=MixedQuantizeConfig,
        description="A gradual change from fp16 values to quantised values.",
    )


class ActivationSharedConfig(Section):
    """Settings that all groups of activations share."""

    enabled: bool = Field(default=False, description="Quantises activations.")
    quantization_type: Symmetry = Field(
        default="symmetric", description='"symmetric" has a scale only, "asymmetric" an offset too.'
    )
    range_calibration: Literal["dynamic", "static"] = Field(
        default="dynamic",
        description='"dynamic" takes the range from each batch, "static" from earlier batches.',
    )
    schedule_offset: Count = Field(default=1000, description="Training step at which quantisation starts.")


class PruningSharedConfig(Section):
    """Settings that all groups of one kind of pruning share."""

    enabled: bool = Field(default=False, description="Prunes weights.")
    method: Literal["l1", "topk", "snip_momentum"] = Field(
        default="l1", description="Criterion that chooses what is pruned."
    )
    schedule_offset: Count = Field(default=1000, description="Training step at which pruning starts.")
    schedule_offset_end: Count | None = Field(
        default=None,
        description='Training step at which pruning ends; for "snip_momentum". Default: the first step.',
    )
    schedule_offset_stride: Positive | None = Field(
        default=None, description='Number of steps between two prunings; for "snip_momentum". Default: 1.'
    )
    block_pattern: str | None = Field(
        default=None,
        description='Shape of the blocks that are pruned as a whole, like "4x1". Default: single elements.',
    )
    dense_ratio: Share | None = Field(
        default=None,
        description='Fraction of the weights that is kept, for "snip_momentum". Default: that of each group.',
    )
    excluded_modules: Names | None = Field(
        default=None, description="Names of modules that are not pruned. Default: none."
    )
    num_heads: Positive | None = Field(
        default=None,
        description="Number of attention heads, for head_pruning. Required by head_pruning. Default: none.",
    )


class GroupConfig(Section):
    """A group of modules with settings of its own."""

    params: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings of the group: start_bits, target_bits, bits, dense_ratio and the like.",
    )
    modules: Names = Field(
        default_factory=lambda: ["*"],
        description='Names of the modules in the group; "*" stands for any text.',
    )
    related_modules: list[list[str]] | list[str] | None = Field(
        default=None,
        description="Names of modules whose inputs shrink with the pruned outputs. Default: none.",
    )


Groups = dict[str, GroupConfig]


class WeightQuantizationConfig(Section):
    """Quantisation of weights."""

    shared_parameters: WeightSharedConfig = Field(
        default_factory=WeightSharedConfig, description="Settings that all groups share."
    )
    different_groups: Groups = Field(
        default_factory=dict, description="Groups of modules under names of your choice."
    )


class ActivationQuantizationConfig(Section):
    """Quantisation of activations."""

    shared_parameters: ActivationSharedConfig = Field(
        default_factory=ActivationSharedConfig, description="Settings that all groups share."
    )
    different_groups: Groups = Field(
        default_factory=dict, description="Groups of modules under names of your choice."
    )


class PruningConfig(Section):
    """Pruning: a part of the weights becomes zero."""

    shared_parameters: PruningSharedConfig = Field(
        default_factory=PruningSharedConfig, description="Settings that all groups share."
    )
    different_groups: Groups = Field(
        default_factory=dict, description="Groups of modules under names of your choice."
    )


class LayerReductionConfig(Section):
    """A student model with fewer layers than its teacher."""

    enabled: bool = Field(
        default=False, description="Copies some layers of the teacher into a smaller student."
    )
    keep_number_layer: Positive | None = Field(
        default=None, description="Number of layers of the student. Required. Default: none."
    )
    keep_number_layers: Positive | None = Field(
        default=None, description="Second spelling of keep_number_layer. Default: unset."
    )
    module_name_prefix: str | None = Field(
        default=None,
        description="Name of the list of layers in the model. Required. Default: none.",
    )
    teacher_layer: list[Count] | None = Field(
        default=None,
        description="Indices of the teacher's layers that are copied. Required. Default: none.",
    )
    other_module_name: list[str] | None = Field(
        default=None, description="Names of other modules that are copied. Default: none."
    )


class CompressionConfig(Section):
    """Quantisation and pruning during training."""

    weight_quantization: WeightQuantizationConfig = Field(
        default_factory=WeightQuantizationConfig, description="Quantisation of weights."
    )
    activation_quantization: ActivationQuantizationConfig = Field(
        default_factory=ActivationQuantizationConfig, description="Quantisation of activations."
    )
    sparse_pruning: PruningConfig = Field(
        default_factory=PruningConfig, description="Pruning of single elements."
    )
    row_pruning: PruningConfig = Field(
        default_factory=PruningConfig, description="Pruning of whole rows of weights."
    )
    head_pruning: PruningConfig = Field(
        default_factory=PruningConfig, description="Pruning of attention heads."
    )
    channel_pruning: PruningConfig = Field(
        default_factory=PruningConfig, description="Pruning of convolution channels."
    )
    layer_reduction: LayerReductionConfig = Field(
        default_factory=LayerReductionConfig, description="A student model with fewer layers."
    )
