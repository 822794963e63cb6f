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
    """Compute in float16 with fp32 master parameters, and a loss scale that keeps small gradients."""

    enabled: bool = Field(
        default=False, description="Cast floating-point parameters to float16 for forward and backward."
    )
    auto_cast: bool = Field(default=False, description="Cast floating-point inputs too.")
    loss_scale: NotNegative = Field(default=0.0, description="Constant factor of the loss; 0: a dynamic one.")
    initial_scale_power: Annotated[Count, Field(le=127)] = Field(
        default=16, description="Dynamic: begin with 2 to this power."
    )
    loss_scale_window: Positive = Field(
        default=1000, description="Dynamic: doubled after so many more steps in a row without overflow."
    )
    hysteresis: Positive = Field(
        default=2,
        description="Dynamic: the overflow from which on it is halved; those before only skip their step.",
    )
    consecutive_hysteresis: bool = Field(
        default=False, description="Dynamic: count overflows anew after a step without one."
    )
    min_loss_scale: Positive = Field(
        default=1,
        description="Dynamic: it never goes below this; an overflow there ends the run with an error that names "
        "a parameter.",
    )
    fp16_master_weights_and_grads: bool = Field(
        default=False, description="Keep masters and gradients in float16 too."
    )


class Bf16Config(Section):
    """Compute in bfloat16 with fp32 master parameters, fp32 gradient sums and fp32 optimizer states."""

    enabled: bool = Field(
        default=False,
        description="Cast floating-point parameters and inputs to bfloat16 for forward and backward.",
    )
    immediate_grad_update: bool = Field(
        default=False, description="Add each gradient to the fp32 sum as soon as it is there."
    )
    check_grad_overflow: bool = Field(default=True, description="Skip steps whose gradient is not finite.")
    bf16_master_weights_and_grads: bool = Field(
        default=False, description="Keep masters and gradients in bfloat16 too."
    )
    bf16_optimizer_states: bool = Field(default=False, description="Keep optimizer states in bfloat16.")


class TorchAutocastConfig(Section):
    """torch.autocast around forward, with fp32 master parameters."""

    enabled: bool = Field(default=False, description="Use it.")
    dtype: LowDtype | None = Field(
        default=None,
        description="In which operations compute. Default: torch's choice, bf16 on a CPU and fp16 on CUDA. With "
        "fp16 losses are scaled as the section fp16 says.",
    )
    lower_precision_safe_modules: Names | None = Field(
        default=None,
        description="Classes, by full name, of modules that compute in it alone: their parameters rest and travel "
        "in it. Default: torch.nn.Linear, Conv1d, Conv2d and Conv3d.",
    )


class DataTypesConfig(Section):
    """Dtypes of sums, parameters and buffers."""

    grad_accum_dtype: Dtype | None = Field(
        default=None, description="In which gradients of micro-batches are summed. Default: fp32."
    )
    param_dtype: Dtype | None = Field(
        default=None,
        description="In which parameters compute; has to be what the sections fp16 and bf16 say, which decide.",
    )
    buffer_dtype: Dtype | None = Field(default=None, description="Of buffers. Default: as they are.")
    keep_in_fp32_modules: Literal["auto"] | Names = Field(
        default="auto",
        description="Patterns of names of buffers that are fp32 under fp16 and bf16, whatever buffer_dtype says; "
        '"auto": those that a transformers model names itself.',
    )
