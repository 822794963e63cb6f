"""Settings of DeepSpeed's that this version does not have.

They are refused by name: ignoring one would train something else than what was asked for. A section that is
switched off (`"enabled": false`), or a value that asks for nothing, is accepted, because nothing is lost.
"""

from __future__ import annotations

from typing import Any

TOP = frozenset(
    [
        "activation_checkpointing",
        "aio",
        "amp",
        "autotuning",
        "comet",
        "comms_logger",
        "communication_data_type",
        "compile",
        "compression_training",
        "csv_monitor",
        "curriculum_learning",
        "data_efficiency",
        "data_parallel_size",
        "data_types",
        "dataloader_drop_last",
        "disable_allgather",
        "dump_state",
        "eigenvalue",
        "elasticity",
        "expert_parallel",
        "flops_profiler",
        "fp16",
        "gradient_allreduce_op",
        "gradient_predivide_factor",
        "graph_harvesting",
        "hybrid_engine",
        "log_level",
        "managed_gradient_accumulation",
        "memory_breakdown",
        "nebula",
        "pipeline",
        "prescale_gradients",
        "progressive_layer_drop",
        "quantize_training",
        "seq_parallel_communication_data_type",
        "sequence_parallel_size",
        "sparse_attention",
        "sparse_gradients",
        "tensor_parallel",
        "tensorboard",
        "timers",
        "torch_autocast",
        "use_data_before_expert_parallelism",
        "vocabulary_size",
        "wall_clock_breakdown",
        "wandb",
        "weight_quantization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
    ]
)
ZERO = frozenset(
    [
        "allgather_bucket_size",
        "allgather_partitions",
        "contiguous_gradients",
        "cpu_offload",
        "cpu_offload_param",
        "cpu_offload_use_pin_memory",
        "elastic_checkpoint",
        "enable_sanity_checks",
        "ignore_unused_parameters",
        "leaf_module",
        "legacy_stage1",
        "load_from_fp32_weights",
        "log_trace_cache_warnings",
        "memory_efficient_linear",
        "mics_shard_size",
        "offload_param",
        "overlap_comm",
        "override_module_apply",
        "pipeline_loading_checkpoint",
        "reduce_scatter",
        "round_robin_gradients",
        "stage3_allgather_sequential",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold",
        "stage3_prefetch_bucket_size",
        "stage3_use_all_reduce_for_fetch_params",
        "sub_group_size",
        "use_multi_rank_bucket_allreduce",
        "zenflow",
        "zero_hpz_partition_size",
        "zero_quantized_gradients",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_weights",
        "zeropp_loco_param",
    ]
)
OFFLOAD = frozenset(
    [
        "buffer_count",
        "cpuadam_cores_perc",
        "fast_init",
        "nvme_path",
        "pipeline_read",
        "pipeline_write",
        "ratio",
        "super_offload",
    ]
)
CHECKPOINT = frozenset(
    [
        "checkpoint_serialization",
        "load_universal",
        "parallel_write",
        "tag_validation",
        "use_node_local_storage",
        "writer",
    ]
)
BF16 = frozenset(
    ["bf16_master_weights_and_grads", "bf16_optimizer_states", "check_grad_overflow", "immediate_grad_update"]
)

BY_SECTION: dict[str, frozenset[str]] = {
    "": TOP,
    "bf16": BF16,
    "checkpoint": CHECKPOINT,
    "zero_optimization": ZERO,
    "zero_optimization.offload_optimizer": OFFLOAD,
}


def is_foreign(section: str, key: str) -> bool:
    """Whether a section (dotted path, "" for the top level) of DeepSpeed's has that key, and ours has not."""
    return key in BY_SECTION.get(section, frozenset())


def asks_for_nothing(value: Any) -> bool:
    """Off in every spelling: false, null, {}, {"enabled": false, ...}, {"device": "none"}."""
    if isinstance(value, dict):
        return not value or value.get("enabled") is False or value == {"device": "none"}
    return value is None or value is False
