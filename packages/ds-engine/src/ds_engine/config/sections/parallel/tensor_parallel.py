"""The section `tensor_parallel`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ds_engine.config.support.section import Count, Positive, Section


class TpConfig(Section):
    """The ranks that share a layer."""

    tp_size: Positive = Field(default=1, description="Number of ranks that share a layer.")
    tp_grain_size: Positive = Field(
        default=1, description="Number of elements that are never divided; shards are multiples of it."
    )
    mpu: Any = Field(
        default=None,
        description="Object with Megatron's methods that returns the process groups. Default: none.",
    )
    tp_group: Any = Field(
        default=None,
        description="Process group of the ranks that share a layer. Default: a new group.",
    )


class PartitionConfig(Section):
    """Which weights are divided, and how."""

    use_default_specs: bool = Field(
        default=True, description="Adds the rules of preset_model to layer_specs."
    )
    layer_specs: list[dict[str, Any]] = Field(
        default_factory=list,
        description="Rules for weights: patterns of names, partition_type (row, column or skip), shape and "
        "partition_dim.",
    )


class TensorParallelConfig(Section):
    """Tensor parallelism: single layers are divided among ranks."""

    autotp_size: Count = Field(
        default=0, description="Number of ranks that share a layer; 0 and 1 mean that layers are not divided."
    )
    dtype: Any = Field(default="fp16", description="Dtype of the model.")
    tp_overlap_comm: bool = Field(default=False, description="Runs collectives while other work computes.")
    vocab_parallel_lm_head: bool | None = Field(
        default=None, description="Divides the output layer along the vocabulary. Default: false."
    )
    vocab_parallel_ce_backend: Literal["torch", "liger"] = Field(
        default="torch", description="Implementation of the cross entropy over a divided vocabulary."
    )
    tp: TpConfig = Field(default_factory=TpConfig, description="The ranks that share a layer.")
    injection_policy_tuple: list[str] | None = Field(
        default=None,
        description="Names of layers whose outputs are summed over the ranks. Default: detected from the model.",
    )
    partition_config: PartitionConfig | None = Field(
        default=None,
        description="Which weights are divided, and how. Default: the rules of the model family.",
    )
    preset_model: str | None = Field(
        default=None,
        description="Model family whose rules are used: llama, bloom, chatglm, mixtral, deepseek_v2, qwen2 or "
        "phi3. Default: detected from the model.",
    )
    sequence_parallel_norms: bool = Field(
        default=False,
        description="Between layers that are divided, gives each rank only some tokens, so that norms are computed "
        "once. The number of tokens must be a multiple of the ranks.",
    )
    keep_module_on_host: bool = Field(default=False, description="Leaves the model in host memory.")
    replace_with_kernel_inject: bool = Field(
        default=False, description="Replaces layers by inference kernels."
    )

    @property
    def ranks(self) -> int:
        """Number of ranks that share a layer."""
        return max(1, self.autotp_size, self.tp.tp_size)
