"""The section `tensor_parallel`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ds_engine.config.support.section import Count, Positive, Section


class TpConfig(Section):
    """Ranks that share a layer."""

    tp_size: Positive = Field(default=1, description="How many.")
    tp_grain_size: Positive = Field(default=1, description="Elements that stay together.")
    mpu: Any = Field(default=None, description="An object that knows the groups.")
    tp_group: Any = Field(default=None, description="The group itself.")


class PartitionConfig(Section):
    """Which weights are cut, and how."""

    use_default_specs: bool = Field(default=True, description="Add those of the preset.")
    layer_specs: list[dict[str, Any]] = Field(
        default_factory=list,
        description="patterns, partition_type (row, column or skip), shape, partition_dim.",
    )


class TensorParallelConfig(Section):
    """Layers that are cut across ranks."""

    autotp_size: Count = Field(default=0, description="Ranks that share a layer; 0 or 1: none.")
    dtype: Any = Field(default="fp16", description="Dtype of the model.")
    tp_overlap_comm: bool = Field(default=False, description="Communicate while computing.")
    vocab_parallel_lm_head: bool | None = Field(default=None, description="Cut the last layer too.")
    vocab_parallel_ce_backend: Literal["torch", "liger"] = Field(
        default="torch", description="Which cross entropy is used then."
    )
    tp: TpConfig = Field(default_factory=TpConfig, description="The group.")
    injection_policy_tuple: list[str] | None = Field(default=None, description="Layers whose sum is taken.")
    partition_config: PartitionConfig | None = Field(default=None, description="Which weights are cut.")
    preset_model: str | None = Field(
        default=None, description="llama, bloom, chatglm, mixtral, deepseek_v2, qwen2 or phi3."
    )
    keep_module_on_host: bool = Field(default=False, description="Leave the model in host memory.")
    replace_with_kernel_inject: bool = Field(
        default=False, description="Replace layers by inference kernels."
    )
