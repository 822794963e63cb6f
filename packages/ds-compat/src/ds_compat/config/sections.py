"""DeepSpeed's models of configuration sections, for code that uses sections directly.

Training uses ds_engine's configuration; these classes only store and check values.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ds_compat.utils.logs import logger
from ds_engine.config.sections.zero.leaf_module import DEFAULT_CLASSES

DEFAULT_LEAF_MODULE_CLASSES = list(DEFAULT_CLASSES)
DEFAULT_LEAF_MODULE_NAMES: list[str] = []
DEFAULT_LEAF_MODULE_NAME_SUFFIXES: list[str] = []


class ZeroStageEnum(int, Enum):
    """Names of the ZeRO stages."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3
    max_stage = 3


class OffloadDeviceEnum(str, Enum):
    """Devices for offloaded state."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class DeepSpeedConfigModel(BaseModel):
    """Base class of sections: unknown keys are errors, and "auto" stands for the default."""

    model_config = ConfigDict(
        extra="forbid",
        validate_default=True,
        validate_assignment=True,
        populate_by_name=True,
        use_enum_values=True,
        arbitrary_types_allowed=True,
    )

    def __init__(self, strict: bool = False, **data: Any) -> None:
        super().__init__(**(data if strict else {k: v for k, v in data.items() if v != "auto"}))
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if name in self.model_fields_set and isinstance(extra, dict) and extra.get("deprecated"):
                self._take_the_place(name, extra)

    def _take_the_place(self, old: str, extra: Mapping[str, Any]) -> None:
        """A field declared with `json_schema_extra={"deprecated": True, "new_param": ...}` was given."""
        *path, new = str(extra.get("new_param", "")).split(".")
        logger.warning(f"Config parameter {old} is deprecated{f', use {new} instead' if new else ''}")
        if new and extra.get("set_new_param", True):
            home = functools.reduce(getattr, path, self)
            assert new not in home.model_fields_set, (
                f"{old} and {new}, which replaces it, cannot both be given"
            )
            setattr(home, new, extra.get("new_param_fn", lambda value: value)(getattr(self, old)))


def _number(value: Any) -> Any:
    """Rejects booleans, which pydantic would accept as 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"it must be a number, not {value!r}")
    return value


_A_NUMBER = BeforeValidator(_number)


class DeepSpeedFP16Config(DeepSpeedConfigModel):
    """The section fp16."""

    enabled: bool = False
    auto_cast: bool = False
    loss_scale: Annotated[float, _A_NUMBER] = Field(0, ge=0, allow_inf_nan=False)
    initial_scale_power: Annotated[int, _A_NUMBER] = Field(16, ge=0, le=127)
    loss_scale_window: Annotated[float, _A_NUMBER] = Field(1000, allow_inf_nan=False)
    hysteresis: Annotated[float, _A_NUMBER] = Field(2, allow_inf_nan=False)
    consecutive_hysteresis: bool = False
    min_loss_scale: Annotated[float, _A_NUMBER] = Field(1, allow_inf_nan=False)
    fp16_master_weights_and_grads: bool = False

    @model_validator(mode="after")
    def _check_dynamic_scale(self) -> DeepSpeedFP16Config:
        """Checks the settings of a dynamic loss scale, only if there is one."""
        if self.enabled and self.loss_scale == 0:
            for name in ("loss_scale_window", "hysteresis", "min_loss_scale"):
                if getattr(self, name) <= 0:
                    raise ValueError(
                        f"{name} is {getattr(self, name):g}: a dynamic loss scale needs a positive number"
                    )
        return self

    def initial_dynamic_scale(self) -> float:
        return float(2**self.initial_scale_power)

    def dynamic_loss_scale_args(self) -> dict[str, Any] | None:
        """Arguments of a dynamic loss scaler, if any were set."""
        given = {
            "initial_scale_power",
            "loss_scale_window",
            "min_loss_scale",
            "hysteresis",
            "consecutive_hysteresis",
        }
        if not given & self.model_fields_set:
            return None
        return {
            "init_scale": 2**self.initial_scale_power,
            "scale_window": self.loss_scale_window,
            "min_scale": self.min_loss_scale,
            "delayed_shift": self.hysteresis,
            "consecutive_hysteresis": self.consecutive_hysteresis,
        }


class DeepSpeedBF16Config(DeepSpeedConfigModel):
    """The section bf16."""

    enabled: bool = False
    immediate_grad_update: bool = False
    check_grad_overflow: bool = True
    bf16_master_weights_and_grads: bool = False
    bf16_optimizer_states: bool = False


def get_bfloat16_config(param_dict: Mapping[str, Any]) -> DeepSpeedBF16Config:
    """Reads the section from a whole configuration; "bfloat16" is its old name."""
    return DeepSpeedBF16Config(**(param_dict.get("bf16") or param_dict.get("bfloat16") or {}))


def get_float16_config(param_dict: Mapping[str, Any]) -> DeepSpeedFP16Config:
    return DeepSpeedFP16Config(**(param_dict.get("fp16") or {}))


class OffloadStateTypeEnum(str, Enum):
    """Kinds of state that can be offloaded."""

    optim_states = "optim_states"
    hp_params = "hp_params"
    lp_params = "lp_params"
    lp_grads = "lp_grads"
    contiguous_grad_buffer = "contiguous_grad_buffer"


class DeepSpeedZeroOffloadParamConfig(DeepSpeedConfigModel):
    """The section offload_param."""

    device: OffloadDeviceEnum = OffloadDeviceEnum.none
    nvme_path: Path | None = None
    buffer_count: int = Field(5, ge=0)
    buffer_size: int = Field(int(1e8), ge=0)
    max_in_cpu: int = Field(int(1e9), ge=0)
    pin_memory: bool = True


class DeepSpeedZeroOffloadOptimizerConfig(DeepSpeedConfigModel):
    """The section offload_optimizer."""

    device: OffloadDeviceEnum = OffloadDeviceEnum.none
    nvme_path: Path | None = None
    buffer_count: int = Field(4, ge=0)
    pin_memory: bool = True
    pipeline_read: bool = False
    pipeline_write: bool = False
    fast_init: bool = False
    ratio: float = Field(1.0, ge=0.0, le=1.0)
    super_offload: bool = False
    cpuadam_cores_perc: float = Field(0.8, ge=0.0, le=1.0)

    @property
    def pipeline(self) -> bool:
        return self.pipeline_read or self.pipeline_write


class DeepSpeedZeroLeafModuleConfig(DeepSpeedConfigModel):
    """The section leaf_module."""

    classes: list[str] = Field(default_factory=lambda: list(DEFAULT_LEAF_MODULE_CLASSES))
    names: list[str] = Field(default_factory=list)
    name_suffixes: list[str] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _single_texts(cls, values: Any) -> Any:
        return {k: [v] if isinstance(v, str) else v for k, v in (values or {}).items()}

    @model_validator(mode="after")
    def _each_once(self) -> DeepSpeedZeroLeafModuleConfig:
        for name in ("classes", "names", "name_suffixes"):
            vars(self)[name] = list(dict.fromkeys(getattr(self, name)))
        return self


def _stage3(name: str, default: Any) -> Any:
    return Field(default, ge=0, alias=f"stage3_{name}")


class DeepSpeedZeroConfig(DeepSpeedConfigModel):
    """The section zero_optimization."""

    stage: ZeroStageEnum = ZeroStageEnum.disabled
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: int = Field(int(5e8), gt=0)
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: int = Field(int(5e8), ge=0)
    overlap_comm: bool | None = None
    compute_grad_norm: bool = True
    load_from_fp32_weights: bool = True
    elastic_checkpoint: bool = False
    offload_param: DeepSpeedZeroOffloadParamConfig | None = None
    offload_optimizer: DeepSpeedZeroOffloadOptimizerConfig | None = None
    sub_group_size: int = Field(int(1e9), ge=0)
    prefetch_bucket_size: int = _stage3("prefetch_bucket_size", int(5e7))
    param_persistence_threshold: int = _stage3("param_persistence_threshold", int(1e5))
    model_persistence_threshold: int = _stage3("model_persistence_threshold", 2**63 - 1)
    max_live_parameters: int = _stage3("max_live_parameters", int(1e9))
    max_reuse_distance: int = _stage3("max_reuse_distance", int(1e9))
    gather_16bit_weights_on_model_save: bool = Field(False, alias="stage3_gather_16bit_weights_on_model_save")
    module_granularity_threshold: int = _stage3("module_granularity_threshold", 0)
    use_all_reduce_for_fetch_params: bool = Field(False, alias="stage3_use_all_reduce_for_fetch_params")
    allgather_sequential: bool = Field(False, alias="stage3_allgather_sequential")
    ignore_unused_parameters: bool = True
    legacy_stage1: bool = False
    round_robin_gradients: bool = False
    parameter_alignment: bool = False
    zero_hpz_partition_size: int = Field(1, ge=0)
    zero_quantized_weights: bool = False
    zero_quantized_nontrainable_weights: bool = False
    zero_quantized_gradients: bool = False
    memory_efficient_linear: bool = True
    pipeline_loading_checkpoint: bool = False
    override_module_apply: bool = True
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False
    save_muon_momentum_buffer_in_memory: bool = False
    leaf_module: DeepSpeedZeroLeafModuleConfig = Field(default_factory=DeepSpeedZeroLeafModuleConfig)

    @model_validator(mode="before")
    @classmethod
    def _old_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        new = dict(values)
        pinned = new.pop("cpu_offload_use_pin_memory", None)
        options = {"device": "cpu", **({} if pinned is None else {"pin_memory": pinned})}
        for old, name in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
            if new.pop(old, None):
                new.setdefault(name, dict(options))
        if "stage3_gather_fp16_weights_on_model_save" in new:
            new["stage3_gather_16bit_weights_on_model_save"] = new.pop(
                "stage3_gather_fp16_weights_on_model_save"
            )
        return new

    @model_validator(mode="after")
    def _depends_on_stage(self) -> DeepSpeedZeroConfig:
        if self.overlap_comm is None:
            vars(self)["overlap_comm"] = self.stage == 3
        if self.offload_optimizer is not None and self.offload_optimizer.ratio < 1.0 and self.stage != 3:
            raise ValueError("Partial offloading only supported for ZeRO Stage 3.")
        return self


def get_zero_config(param_dict: Mapping[str, Any]) -> DeepSpeedZeroConfig:
    """Reads the section from a whole configuration."""
    section = param_dict.get("zero_optimization", {})
    return DeepSpeedZeroConfig(**({"stage": int(section)} if isinstance(section, bool) else section))
