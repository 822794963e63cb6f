"""The configuration of `init_inference`, with DeepSpeed's keys. Each key works, has no effect (with a warning), or is
refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import AliasChoices, BeforeValidator, ConfigDict, Field, ValidationError

from ds_engine.config.support.errors import ConfigError
from ds_engine.config.support.section import Positive, Section
from ds_engine.config.support.suggest import did_you_mean

_DTYPES: Mapping[str, torch.dtype] = {
    **dict.fromkeys(("fp32", "float32", "float", "torch.float32"), torch.float32),
    **dict.fromkeys(("fp16", "float16", "half", "torch.float16"), torch.float16),
    **dict.fromkeys(("bf16", "bfloat16", "torch.bfloat16"), torch.bfloat16),
}


def _dtype(value: Any) -> Any:
    """Converts a torch dtype, its name, or an enum member with one of these as its value."""
    for member in (
        getattr(value, "value", value) if isinstance(getattr(value, "value", None), tuple) else (value,)
    ):
        dtype = _DTYPES.get(str(member).lower())
        if dtype is not None:
            return dtype
    if value is None:
        return None
    raise ValueError("it must be fp32, fp16 or bf16; quantised weights are not supported")


Dtype = Annotated[Any, BeforeValidator(_dtype)]
"""fp32, fp16 or bf16, also as torch dtypes."""


class InferenceTpConfig(Section):
    """The ranks among which one replica of the model is divided."""

    enabled: bool = Field(
        default=True,
        description="Divides the model among ranks; with false every rank holds the whole model.",
    )
    tp_size: Positive = Field(default=1, description="Number of ranks among which one replica is divided.")
    tp_grain_size: Positive = Field(
        default=64, description="Shards are multiples of this number of elements."
    )
    mpu: Any = Field(
        default=None,
        description="Object with Megatron's methods that returns the process group. Default: none.",
    )
    tp_group: Any = Field(
        default=None,
        description="Process group of the ranks of one replica. Default: a new group.",
    )


class InferenceConfig(Section):
    """Settings of `init_inference`."""

    model_config = ConfigDict(populate_by_name=True)

    dtype: Dtype = Field(
        default=None,
        description="Dtype of the weights: fp32, fp16 or bf16, or a torch dtype. Default: that of the model.",
    )
    tensor_parallel: InferenceTpConfig = Field(
        default_factory=InferenceTpConfig,
        validation_alias=AliasChoices("tensor_parallel", "tp"),
        description="The ranks among which one replica of the model is divided.",
    )
    mp_size: Positive = Field(default=1, description="Old name of tensor_parallel.tp_size.")
    zero: dict[str, Any] = Field(
        default_factory=dict,
        description="A section zero_optimization; stage 3 divides the parameters among all ranks.",
    )
    checkpoint: str | dict[str, Any] | None = Field(
        default=None,
        description="Weights to load: a checkpoint, a folder in Hugging Face's layout, a file, or a list of "
        'files as {"checkpoints": [...]}, also in a JSON file. Default: the model keeps its '
        "weights.",
    )
    base_dir: str = Field(
        default="",
        description="Directory of relative file names. An empty string means the working directory.",
    )
    keep_module_on_host: bool = Field(default=False, description="Leaves the model on its current device.")
    enable_cuda_graph: bool = False
    use_triton: bool = False
    triton_autotune: bool = False
    replace_with_kernel_inject: bool = Field(
        default=False, validation_alias=AliasChoices("replace_with_kernel_inject", "kernel_inject")
    )
    replace_method: str = "auto"
    injection_policy: dict[Any, Any] | None = Field(
        default=None, validation_alias=AliasChoices("injection_policy", "injection_dict")
    )
    injection_policy_tuple: Any = None
    max_out_tokens: Positive = Field(
        default=1024, validation_alias=AliasChoices("max_out_tokens", "max_tokens")
    )
    min_out_tokens: Positive = Field(default=1, validation_alias=AliasChoices("min_out_tokens", "min_tokens"))
    triangular_masking: bool = Field(default=True, validation_alias=AliasChoices("triangular_masking", "tm"))
    return_tuple: bool = True
    transposed_mode: bool = False
    set_empty_params: bool = False
    training_mp_size: Positive = 1
    quant: dict[str, Any] = Field(default_factory=dict)
    moe: bool | dict[str, Any] = Field(default_factory=dict)
    ep_size: Positive = 1
    save_mp_checkpoint_path: str | None = None
    mpu: Any = None

    @property
    def copy_ranks(self) -> int:
        """Number of ranks among which one replica is divided."""
        return max(self.tensor_parallel.tp_size if self.tensor_parallel.enabled else 1, self.mp_size)

    @property
    def expert_ranks(self) -> int:
        """Number of ranks among which experts are divided."""
        section = self.moe if isinstance(self.moe, dict) and self.moe.get("enabled", True) else {}
        return max(int(section.get("ep_size", 1)), self.ep_size)


KERNELS = "it has no effect, because layers are not replaced by kernels"
IGNORED: Mapping[str, str] = {
    **dict.fromkeys(
        ("replace_with_kernel_inject", "enable_cuda_graph", "use_triton", "triton_autotune", "replace_method",
         "injection_policy", "injection_policy_tuple", "transposed_mode", "triangular_masking", "return_tuple"),
        KERNELS,
    ),
    **dict.fromkeys(("max_out_tokens", "min_out_tokens"), "it has no effect, because there is no cache of fixed "
                                                          "size"),
    "set_empty_params": "it has no effect; construct the model under ds_zero.deferred_init instead",
}  # fmt: skip
"""Keys that would change only speed or memory -> warning if one is set."""
REFUSED: Mapping[str, str] = {
    "quant": "quantised weights are not supported: remove it",
    "training_mp_size": "checkpoints of tensor-parallel training are not supported: remove it",
    "save_mp_checkpoint_path": "layers are not split among ranks, so there is nothing to save: remove it",
    "mpu": "pass tensor_parallel={'tp_size': N}: init_inference creates the process groups",
}
"""Unsupported keys that would change results -> error and remedy."""


def read_inference(
    given: Mapping[str, Any], model: type[InferenceConfig] = InferenceConfig
) -> InferenceConfig:
    """Checks the configuration, and warns about settings without effect.

    Raises:
        ConfigError: unknown keys, wrong types, or unsupported settings. The message lists all mistakes.
    """
    names: dict[str, str] = {}
    for name, info in model.model_fields.items():
        alias = info.validation_alias
        for key in alias.choices if isinstance(alias, AliasChoices) else (name,):
            names[str(key)] = name
    problems = [f'unknown key "{key}"{did_you_mean(key, names)}' for key in given if key not in names]
    try:
        config = model.model_validate({key: value for key, value in given.items() if key in names})
    except ValidationError as error:
        problems += [f"{'.'.join(map(str, e['loc']))} is {e['input']!r}: {e['msg']}" for e in error.errors()]
        raise ConfigError(problems, "the inference configuration") from error
    fresh = model()
    changed = [n for n in model.model_fields if getattr(config, n) != getattr(fresh, n)]
    off = {"quant"} if _is_off(config.quant) else set()
    problems += [f"{name}: {REFUSED[name]}" for name in changed if name in REFUSED and name not in off]
    group = config.tensor_parallel
    problems += [
        f"tensor_parallel.{n}: {REFUSED['mpu']}" for n in ("mpu", "tp_group") if getattr(group, n) is not None
    ]
    if problems:
        raise ConfigError(problems, "the inference configuration")
    for name in changed:
        if name in IGNORED:
            warnings.warn(f"init_inference: {name}: {IGNORED[name]}", stacklevel=3)
    return config


def _is_off(section: Any) -> bool:
    return not section or (isinstance(section, dict) and section.get("enabled") is False)
