"""Sections that DeepSpeed once had and has removed, and that have no successor here: known, so that they can
be refused with a remedy.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ds_engine.config.support.section import Count, NotNegative, Positive, Section, Share


class AmpConfig(Section):
    """NVIDIA Apex, with its own arguments beside `enabled`."""

    enabled: bool = Field(default=False, description="Trains with Apex.")
    opt_level: str | None = Field(
        default=None, description="Argument of Apex: level of mixed precision. Default: Apex's."
    )
    keep_batchnorm_fp32: bool | str | None = Field(
        default=None, description="Argument of Apex: keeps batch norms in fp32. Default: Apex's."
    )
    cast_model_type: Any = Field(
        default=None, description="Argument of Apex: dtype of the model. Default: Apex's."
    )
    patch_torch_functions: bool | None = Field(
        default=None, description="Argument of Apex: casts inside torch's functions. Default: Apex's."
    )
    master_weights: bool | None = Field(
        default=None, description="Argument of Apex: keeps fp32 master weights. Default: Apex's."
    )
    loss_scale: Any = Field(
        default=None, description="Argument of Apex: factor of the loss. Default: Apex's."
    )
    num_losses: Positive | None = Field(
        default=None, description="Argument of Apex: number of losses. Default: Apex's."
    )
    verbosity: Count | None = Field(
        default=None, description="Argument of Apex: amount of output. Default: Apex's."
    )
    min_loss_scale: NotNegative | None = Field(
        default=None, description="Argument of Apex: lower limit of the loss scale. Default: Apex's."
    )
    max_loss_scale: NotNegative | None = Field(
        default=None, description="Argument of Apex: upper limit of the loss scale. Default: Apex's."
    )


class NebulaConfig(Section):
    """Azure's checkpoint service."""

    enabled: bool = Field(default=False, description="Saves checkpoints through the service.")
    persistent_storage_path: str | None = Field(
        default=None, description="Path of the persistent copies of checkpoints. Default: none."
    )
    persistent_time_interval: Positive = Field(
        default=100, description="Time between two persistent copies, in seconds."
    )
    num_of_version_in_retention: Positive = Field(
        default=2, description="Number of persistent copies that are kept."
    )
    enable_nebula_load: bool = Field(default=True, description="Loads checkpoints through the service too.")
    nebula_load_path: str | None = Field(
        default=None, description="Path from which checkpoints are loaded. Default: persistent_storage_path."
    )


class EigenvalueConfig(Section):
    """Largest eigenvalues of the Hessian of each layer, for quantize_training."""

    enabled: bool = Field(default=False, description="Computes eigenvalues.")
    verbose: bool = Field(default=False, description="Prints the eigenvalues.")
    max_iter: Positive = Field(default=100, description="Maximum number of power iterations.")
    tol: NotNegative = Field(default=1e-2, description="Relative change at which the iteration ends.")
    stability: NotNegative = Field(default=1e-6, description="Number that is added to divisors.")
    gas_boundary_resolution: Positive = Field(
        default=1, description="Number of optimizer steps between two computations."
    )
    layer_name: str = Field(
        default="bert.encoder.layer", description="Name of the list of layers in the model."
    )
    layer_num: Count = Field(default=0, description="Number of layers.")


class QuantizeBitsConfig(Section):
    """Number of bits at the start and the end of training."""

    start_bits: Positive = Field(default=16, description="Number of bits at the start.")
    target_bits: Positive = Field(default=8, description="Number of bits at the end.")


class QuantizeScheduleConfig(Section):
    """When the number of bits changes."""

    quantize_period: Positive = Field(
        default=1000,
        description="Number of training steps until the first change; it doubles with each change.",
    )
    schedule_offset: Count = Field(default=1000, description="Training step at which quantisation starts.")


class QuantizeAlgoConfig(Section):
    """How values are quantised."""

    q_type: Literal["symmetric", "asymmetric"] = Field(
        default="symmetric", description='"symmetric" has a scale only, "asymmetric" an offset too.'
    )
    rounding: Literal["nearest", "stochastic"] = Field(
        default="nearest", description="How values are rounded."
    )


class Fp16MixedConfig(Section):
    """A gradual change from fp16 values to quantised values."""

    enabled: bool = Field(default=False, description="Mixes fp16 values and quantised values at the start.")
    quantize_change_ratio: Share = Field(
        default=0.001, description="Fraction of the mixture that changes to quantised values in each step."
    )


class QuantizeTrainingConfig(Section):
    """Mixture of quantisation (MoQ): the number of bits falls during training."""

    enabled: bool = Field(default=False, description="Quantises weights during training.")
    quantize_verbose: bool = Field(default=False, description="Prints each change of the number of bits.")
    quantizer_kernel: bool = Field(default=False, description="Quantises with DeepSpeed's CUDA kernel.")
    quantize_groups: Positive = Field(
        default=1, description="Number of parts of a tensor that have a scale of their own."
    )
    quantize_bits: QuantizeBitsConfig = Field(
        default_factory=QuantizeBitsConfig,
        alias="quantize-bits",
        description="Number of bits at the start and the end of training.",
    )
    quantize_algo: QuantizeAlgoConfig = Field(
        default_factory=QuantizeAlgoConfig, alias="quantize-algo", description="How values are quantised."
    )
    quantize_schedule: QuantizeScheduleConfig = Field(
        default_factory=QuantizeScheduleConfig, description="When the number of bits changes."
    )
    fp16_mixed_quantize: Fp16MixedConfig = Field(
        default_factory=Fp16MixedConfig, description="A gradual change from fp16 values to quantised values."
    )
    eigenvalue: EigenvalueConfig = Field(
        default_factory=EigenvalueConfig, description="Eigenvalues that decide how soon a layer is quantised."
    )
