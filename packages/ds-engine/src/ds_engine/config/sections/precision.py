"""The sections `fp16`, `bf16`, `torch_autocast` and `data_types`; without them everything is computed in the
dtype that the model has, usually fp32.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ds_engine.config.support.section import Count, Names, NotNegative, Positive, Section

_SPELLINGS = {
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float": "fp32",
}


def _short(value: object) -> object:
    """Take "torch.float16", "float16", "half" and torch.float16 itself as "fp16"."""
    text = str(value).removeprefix("torch.").lower()
    return _SPELLINGS.get(text, text if isinstance(value, str) else value)


Dtype = Annotated[Literal["fp16", "bf16", "fp32"], BeforeValidator(_short)]
"""A dtype in any of torch's spellings."""
LowDtype = Annotated[Literal["fp16", "bf16"], BeforeValidator(_short)]
"""One of the two of 16 bits."""


class Fp16Config(Section):
    """Mixed precision in float16, with fp32 master parameters and a loss scale against vanishing gradients."""

    enabled: bool = Field(
        default=False, description="Casts floating-point parameters to float16 for forward and backward."
    )
    auto_cast: bool = Field(default=False, description="Also casts floating-point inputs to float16.")
    loss_scale: NotNegative = Field(
        default=0.0, description="Constant loss scale; 0 selects a dynamic loss scale."
    )
    initial_scale_power: Annotated[Count, Field(le=127)] = Field(
        default=16, description="The initial dynamic loss scale is 2 to this power."
    )
    loss_scale_window: Positive = Field(
        default=1000,
        description="Number of steps without overflow after which the dynamic loss scale is doubled.",
    )
    hysteresis: Positive = Field(
        default=2,
        description="Number of overflows until the dynamic loss scale is halved; the overflows before only skip "
        "their step.",
    )
    consecutive_hysteresis: bool = Field(
        default=False,
        description="Restores hysteresis after every step without overflow, so that only consecutive "
        "overflows count.",
    )
    min_loss_scale: Positive = Field(
        default=1,
        description="Lower limit of the dynamic loss scale. An overflow at this scale ends training with an "
        "error that names a parameter.",
    )
    fp16_master_weights_and_grads: bool = Field(
        default=False, description="Keeps master parameters and gradients in float16 too."
    )


class Bf16Config(Section):
    """Mixed precision in bfloat16, with fp32 master parameters, gradient sums and optimizer states."""

    enabled: bool = Field(
        default=False,
        description="Casts floating-point parameters and inputs to bfloat16 for forward and backward.",
    )
    immediate_grad_update: bool = Field(
        default=False, description="Adds each gradient to the fp32 sum as soon as it has been computed."
    )
    check_grad_overflow: bool = Field(
        default=True, description="Skips optimizer steps whose gradients are not finite."
    )
    bf16_master_weights_and_grads: bool = Field(
        default=False, description="Keeps master parameters and gradients in bfloat16 too."
    )
    bf16_optimizer_states: bool = Field(default=False, description="Keeps optimizer states in bfloat16.")


class TorchAutocastConfig(Section):
    """Mixed precision by torch.autocast around forward, with fp32 master parameters."""

    enabled: bool = Field(default=False, description="Runs forward under torch.autocast.")
    dtype: LowDtype | None = Field(
        default=None,
        description="Dtype of the autocast region. With fp16, losses are scaled as configured in the section "
        "fp16. Default: torch's choice, bf16 on a CPU and fp16 on CUDA.",
    )
    lower_precision_safe_modules: Names | None = Field(
        default=None,
        description="Full class names of modules whose parameters are kept and sent in that dtype. Default: "
        "torch.nn.Linear, Conv1d, Conv2d and Conv3d.",
    )


class DataTypesConfig(Section):
    """Dtypes of gradient sums, parameters and buffers."""

    grad_accum_dtype: Dtype | None = Field(
        default=None, description="Dtype in which gradients of micro-batches are summed. Default: fp32."
    )
    param_dtype: Dtype | None = Field(
        default=None,
        description="Compute dtype of parameters. It must match the sections fp16 and bf16, which select the "
        "dtype. Default: the dtype that these select.",
    )
    buffer_dtype: Dtype | None = Field(
        default=None, description="Dtype of the model's floating-point buffers. Default: unchanged."
    )
    keep_in_fp32_modules: Literal["auto"] | Names = Field(
        default="auto",
        description="Patterns of the names of buffers that stay in fp32, regardless of fp16, bf16 and "
        'buffer_dtype. "auto" takes the patterns from a transformers model.',
    )
