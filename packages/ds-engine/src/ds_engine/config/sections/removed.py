"""Sections that DeepSpeed once had and has removed, and that have no successor here: known, so that they can
be refused with a remedy.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ds_engine.config.support.section import Count, NotNegative, Positive, Section, Share


class AmpConfig(Section):
    """NVIDIA Apex; its own arguments beside `enabled`."""

    enabled: bool = Field(default=False, description="Use Apex.")
    opt_level: str | None = Field(default=None, description="Apex's level.")
    keep_batchnorm_fp32: bool | str | None = Field(default=None, description="Apex's.")
    cast_model_type: Any = Field(default=None, description="Apex's.")
    patch_torch_functions: bool | None = Field(default=None, description="Apex's.")
    master_weights: bool | None = Field(default=None, description="Apex's.")
    loss_scale: Any = Field(default=None, description="Apex's.")
    num_losses: Positive | None = Field(default=None, description="Apex's.")
    verbosity: Count | None = Field(default=None, description="Apex's.")
    min_loss_scale: NotNegative | None = Field(default=None, description="Apex's.")
    max_loss_scale: NotNegative | None = Field(default=None, description="Apex's.")


class NebulaConfig(Section):
    """Azure's checkpoint service."""

    enabled: bool = Field(default=False, description="Use it.")
    persistent_storage_path: str | None = Field(default=None, description="Where checkpoints rest.")
    persistent_time_interval: Positive = Field(default=100, description="Seconds between two of them.")
    num_of_version_in_retention: Positive = Field(default=2, description="How many are kept.")
    enable_nebula_load: bool = Field(default=True, description="Load by the service too.")
    nebula_load_path: str | None = Field(default=None, description="From where.")


class EigenvalueConfig(Section):
    """Curvature of each layer, for quantize_training."""

    enabled: bool = Field(default=False, description="Measure it.")
    verbose: bool = Field(default=False, description="Print it.")
    max_iter: Positive = Field(default=100, description="Iterations at most.")
    tol: NotNegative = Field(default=1e-2, description="When to stop.")
    stability: NotNegative = Field(default=1e-6, description="Added to the divisor.")
    gas_boundary_resolution: Positive = Field(default=1, description="Steps between two measurements.")
    layer_name: str = Field(default="bert.encoder.layer", description="Where layers are in the model.")
    layer_num: Count = Field(default=0, description="How many there are.")


class QuantizeBitsConfig(Section):
    """Bits over time."""

    start_bits: Positive = Field(default=16, description="At the beginning.")
    target_bits: Positive = Field(default=8, description="At the end.")


class QuantizeScheduleConfig(Section):
    """When bits change."""

    quantize_period: Positive = Field(default=1000, description="Steps of the first change.")
    schedule_offset: Count = Field(default=1000, description="Step at which it begins.")


class QuantizeAlgoConfig(Section):
    """How values are quantised."""

    q_type: Literal["symmetric", "asymmetric"] = Field(
        default="symmetric", description="Whether there is an offset."
    )
    rounding: Literal["nearest", "stochastic"] = Field(default="nearest", description="How it rounds.")


class Fp16MixedConfig(Section):
    """A slow change."""

    enabled: bool = Field(default=False, description="Change slowly.")
    quantize_change_ratio: Share = Field(default=0.001, description="Change in a step.")


class QuantizeTrainingConfig(Section):
    """Mixture of quantisation (MoQ)."""

    enabled: bool = Field(default=False, description="Quantise.")
    quantize_verbose: bool = Field(default=False, description="Print changes.")
    quantizer_kernel: bool = Field(default=False, description="By DeepSpeed's kernel.")
    quantize_groups: Positive = Field(default=1, description="Parts with a scale of their own.")
    quantize_bits: QuantizeBitsConfig = Field(
        default_factory=QuantizeBitsConfig, alias="quantize-bits", description="Bits over time."
    )
    quantize_algo: QuantizeAlgoConfig = Field(
        default_factory=QuantizeAlgoConfig, alias="quantize-algo", description="How values are quantised."
    )
    quantize_schedule: QuantizeScheduleConfig = Field(
        default_factory=QuantizeScheduleConfig, description="When bits change."
    )
    fp16_mixed_quantize: Fp16MixedConfig = Field(
        default_factory=Fp16MixedConfig, description="A slow change."
    )
    eigenvalue: EigenvalueConfig = Field(default_factory=EigenvalueConfig, description="Curvature.")
