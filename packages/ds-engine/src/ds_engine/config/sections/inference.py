"""The configuration of `init_inference`: DeepSpeed's keys. Each works, is said to do nothing here, or is refused."""

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
    """A torch dtype, the name of one, or an enum member that holds one of these."""
    for member in (
        getattr(value, "value", value) if isinstance(getattr(value, "value", None), tuple) else (value,)
    ):
        found = _DTYPES.get(str(member).lower())
        if found is not None:
            return found
    if value is None:
        return None
    raise ValueError("it has to be fp32, fp16 or bf16: weights in 8 bits belong to kernels that are not here")


Dtype = Annotated[Any, BeforeValidator(_dtype)]
"""fp32, fp16 or bf16, also as torch dtypes."""


class InferenceTpConfig(Section):
    """The ranks that hold one copy of the model together."""

    enabled: bool = Field(
        default=True, description="Divides the model among ranks; with false every rank holds a copy."
    )
    tp_size: Positive = Field(default=1, description="Number of ranks that hold one copy together.")
    tp_grain_size: Positive = Field(
        default=64, description="Number of elements that are never divided where layers are divided."
    )
    mpu: Any = Field(
        default=None,
        description="Object with Megatron's methods that returns the process group. Default: none.",
    )
    tp_group: Any = Field(
        default=None,
        description="Process group of the ranks that hold one copy. Default: a new group.",
    )


class InferenceConfig(Section):
    """How a model is held and run for inference."""

    model_config = ConfigDict(populate_by_name=True)

    dtype: Dtype = Field(
        default=None,
        description="Dtype of the weights: fp32, fp16 or bf16, also as torch dtypes. Default: the model's.",
    )
    tensor_parallel: InferenceTpConfig = Field(
        default_factory=InferenceTpConfig,
        validation_alias=AliasChoices("tensor_parallel", "tp"),
        description="The ranks that hold one copy of the model together.",
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
        description="Directory to which relative file names belong. An empty text stands for the working "
        "directory.",
    )
    keep_module_on_host: bool = Field(
        default=False, description="Leaves the model on the device that it is on."
    )
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
        """Ranks that hold one copy together, as far as `tensor_parallel` asks."""
        return max(self.tensor_parallel.tp_size if self.tensor_parallel.enabled else 1, self.mp_size)


KERNELS = "no kernels are put in place of layers here, so it does nothing"
IGNORED: Mapping[str, str] = {
    **dict.fromkeys(
        ("replace_with_kernel_inject", "enable_cuda_graph", "use_triton", "triton_autotune", "replace_method",
         "injection_policy", "injection_policy_tuple", "transposed_mode", "triangular_masking", "return_tuple"),
        KERNELS,
    ),
    **dict.fromkeys(("max_out_tokens", "min_out_tokens"), "there is no cache of a fixed size, so it does nothing"),
    "set_empty_params": "construct the model under ds_zero.deferred_init instead: it does nothing",
}  # fmt: skip
"""Keys that change speed or memory alone where they work, and what is said when one is set."""
REFUSED: Mapping[str, str] = {
    "quant": "weights in few bits are not there: remove it",
    "moe": "experts on different ranks belong to ds-moe, which this version does not have: remove it",
    "ep_size": "experts on different ranks belong to ds-moe, which this version does not have: remove it",
    "training_mp_size": "checkpoints of models that were cut among ranks in training are not read: remove it",
    "save_mp_checkpoint_path": "layers are not cut among ranks, so there is nothing to save: remove it",
    "mpu": "pass tensor_parallel={'tp_size': N}: groups are made here",
}
"""Keys whose loss would change results, and what to do."""


def read_inference(
    given: Mapping[str, Any], model: type[InferenceConfig] = InferenceConfig
) -> InferenceConfig:
    """Check it; says as warnings which settings do nothing.

    Raises:
        ConfigError: unknown keys, wrong types, settings that are not there; all of them at once.
    """
    names: dict[str, str] = {}
    for name, info in model.model_fields.items():
        alias = info.validation_alias
        for key in alias.choices if isinstance(alias, AliasChoices) else (name,):
            names[str(key)] = name
    problems = [f'unknown key "{key}"{did_you_mean(key, names)}' for key in given if key not in names]
    try:
        found = model.model_validate({key: value for key, value in given.items() if key in names})
    except ValidationError as error:
        problems += [f"{'.'.join(map(str, e['loc']))} is {e['input']!r}: {e['msg']}" for e in error.errors()]
        raise ConfigError(problems, "the inference configuration") from error
    fresh = model()
    changed = [n for n in model.model_fields if getattr(found, n) != getattr(fresh, n)]
    off = {name for name in ("quant", "moe") if _is_off(getattr(found, name))}
    problems += [f"{name}: {REFUSED[name]}" for name in changed if name in REFUSED and name not in off]
    group = found.tensor_parallel
    problems += [
        f"tensor_parallel.{n}: {REFUSED['mpu']}" for n in ("mpu", "tp_group") if getattr(group, n) is not None
    ]
    if problems:
        raise ConfigError(problems, "the inference configuration")
    for name in changed:
        if name in IGNORED:
            warnings.warn(f"init_inference: {name}: {IGNORED[name]}", stacklevel=3)
    return found


def _is_off(section: Any) -> bool:
    return not section or (
        isinstance(section, dict) and (section.get("enabled") is False or section == {"ep_size": 1})
    )
