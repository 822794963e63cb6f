"""Rows of the section `zero_optimization`."""

from __future__ import annotations

from typing import Any

from ds_engine.config.built.row import Row, gone, later, no_effect, works

_ZERO = "zero_optimization"
_OFFLOAD = f"{_ZERO}.offload_optimizer"
_PARAM = f"{_ZERO}.offload_param"


def _stage3(config: Any) -> bool:
    return bool(config.zero_optimization.stage == 3)


def _divides(config: Any) -> bool:
    return bool(config.zero_optimization.stage > 0)


def _publishes(config: Any) -> bool:
    return bool(config.zero_optimization.stage in (1, 2))


def _on_host(config: Any) -> bool:
    return bool(config.zero_optimization.offload_optimizer.device != "none")


def _overlaps(config: Any) -> bool:
    return _on_host(config) and bool(config.zero_optimization.overlaps_step)


def _on_disk(config: Any) -> bool:
    return bool(config.zero_optimization.offload_optimizer.device == "nvme")


def _params_on_disk(config: Any) -> bool:
    zero = config.zero_optimization
    return bool(zero.stage == 3 and zero.offload_param.device == "nvme")


def _only_params(config: Any) -> bool:
    zero = config.zero_optimization
    return bool(zero.stage == 3 and zero.offload_param.device != "none" and not _on_host(config))


_STAGE3 = {"only": _stage3, "otherwise": "the stage is below 3"}
_PUBLISH = {
    "only": _publishes,
    "otherwise": "the stage is 0 or 3",
}
_DIVIDED = {"only": _divides, "otherwise": "the stage is 0"}
_DISK = "nothing is offloaded to a disk"
_OVERLAP = "the disk always reads and writes while the optimizer steps"

ROWS: tuple[Row, ...] = (
    works(f"{_ZERO}.stage", "ds-zero", "ds_zero.shard(stage=...)"),
    works(f"{_ZERO}.reduce_bucket_size", "ds-zero", "ZeroConfig.reduce_bucket_numel"),
    works(f"{_ZERO}.overlap_comm", "ds-zero", "ZeroConfig.overlap_reduce"),
    works(f"{_ZERO}.reduce_scatter", "ds-zero", "ZeroConfig.reduce_scatter", **_DIVIDED),
    works(f"{_ZERO}.ignore_unused_parameters", "ds-zero", "ZeroConfig.ignore_unused"),
    works(f"{_ZERO}.allgather_bucket_size", "ds-zero", "ZeroConfig.publish_bucket_numel", **_PUBLISH),
    works(
        f"{_ZERO}.stage3_model_persistence_threshold",
        "ds-zero",
        "ZeroConfig.model_persistence_numel",
        **_STAGE3,
    ),
    works(f"{_ZERO}.mics_shard_size", "ds-zero", "ds_zero.shard(mesh=...)"),
    works(f"{_ZERO}.accumulation_plan", "ds-zero", "ZeroConfig.accumulation"),
    works(f"{_ZERO}.rank_invariant", "ds-zero", "ZeroConfig.rank_invariant"),
    works(f"{_ZERO}.zero_hpz_partition_size", "ds-zero", "ZeroConfig.secondary_ranks"),
    works(f"{_ZERO}.overlap_publish", "ds-zero", "ZeroConfig.overlap_publish", **_PUBLISH),
    works(
        f"{_ZERO}.stage3_param_persistence_threshold",
        "ds-zero",
        "ZeroConfig.persistence_threshold_numel",
        **_STAGE3,
    ),
    works(f"{_ZERO}.stage3_prefetch", "ds-zero", "ZeroConfig.prefetch", **_STAGE3),
    works(
        f"{_OFFLOAD}.device",
        "ds-offload",
        "ds_offload.HostStore, NVMeStore, PagedOptimizer and CPUAdam",
        needs="ds_offload",
        switches={f"{_OFFLOAD}.device": ("none",)},
    ),
    works(
        f"{_OFFLOAD}.pin_memory",
        "ds-offload",
        "ds_offload.HostStore(pin=...)",
        only=_on_host,
        otherwise="nothing is offloaded to host memory",
    ),
    works(f"{_ZERO}.stage3_prefetch_bucket_size", "ds-zero", "ZeroConfig.prefetch_numel", **_STAGE3),
    works(f"{_ZERO}.stage3_max_live_parameters", "ds-zero", "ZeroConfig.max_live_numel", **_STAGE3),
    works(f"{_ZERO}.stage3_max_reuse_distance", "ds-zero", "ZeroConfig.max_reuse_distance_numel", **_STAGE3),
    works(
        f"{_ZERO}.stage3_module_granularity_threshold",
        "ds-zero",
        "ZeroConfig.module_granularity_numel",
        **_STAGE3,
    ),
    works(
        f"{_ZERO}.stage3_gather_16bit_weights_on_model_save",
        "ds-compat",
        "DeepSpeedEngine.save_16bit_model() and Accelerate",
        **_STAGE3,
    ),
    works(f"{_ZERO}.leaf_module", "ds-zero", "ds_engine.build.zero.leaf_modules", **_STAGE3),
    later(f"{_ZERO}.mics_hierarchical_params_gather", "ds-zero", "hierarchical gathering"),
    works(f"{_ZERO}.zero_quantized_weights", "ds-comm", "QuantizedAllGather", **_STAGE3),
    works(f"{_ZERO}.zero_quantized_nontrainable_weights", "ds-comm", "QuantizedFrozen", **_STAGE3),
    works(
        f"{_ZERO}.zero_quantized_gradients",
        "ds-comm",
        "QuantizedReduceScatter",
        only=lambda config: config.zero_optimization.stage > 0,
        otherwise="the stage is 0",
    ),
    works(
        f"{_ZERO}.zeropp_loco_param",
        "ds-comm",
        "LoCoReduceScatter",
        only=lambda config: (
            config.zero_optimization.stage > 0 and config.zero_optimization.zero_quantized_gradients
        ),
        otherwise="gradients are not quantised (stage 0, or zero_quantized_gradients is false)",
    ),
    no_effect(
        f"{_ZERO}.zenflow",
        "ds-zero",
        "every column is updated in every step, which overlaps with the backward (offload_optimizer.overlap_step)",
    ),
    later(
        f"{_ZERO}.load_from_fp32_weights",
        "ds-engine",
        "loading masters from 16-bit copies",
        "set it to true: checkpoints always contain fp32 masters",
    ),
    works(
        f"{_OFFLOAD}.ratio",
        "ds-offload",
        "ds_offload.TiersByKind(ratio=...)",
        only=_on_host,
        otherwise="nothing is offloaded to host memory",
    ),
    works(
        f"{_OFFLOAD}.overlap_step",
        "ds-zero",
        "ZeroConfig.overlap_step",
        only=_on_host,
        otherwise="nothing is offloaded to host memory",
    ),
    works(
        f"{_OFFLOAD}.undo_bytes",
        "ds-zero",
        "ZeroConfig.undo_bytes",
        only=_overlaps,
        otherwise="overlap_step is false",
    ),
    works(
        f"{_OFFLOAD}.super_offload",
        "ds-zero",
        "ZeroConfig.overlap_step",
        only=_on_host,
        otherwise="nothing is offloaded to host memory",
    ),
    works(
        f"{_PARAM}.device",
        "ds-offload",
        "ds_offload.HostStore and NVMeStore",
        needs="ds_offload",
        switches={f"{_PARAM}.device": ("none",)},
        **_STAGE3,
    ),
    works(f"{_PARAM}.nvme_path", "ds-offload", "ds_offload.NVMeStore", only=_params_on_disk, otherwise=_DISK),
    gone(
        f"{_ZERO}.legacy_stage1",
        "ds-zero",
        "DeepSpeed's first implementation of stage 1",
        "remove it: stage 1 gives the same result",
    ),
    works(f"{_OFFLOAD}.nvme_path", "ds-offload", "ds_offload.NVMeStore", only=_on_disk, otherwise=_DISK),
    works(
        f"{_OFFLOAD}.buffer_count",
        "ds-offload",
        "ds_offload.PagedOptimizer(num_buffers=...)",
        only=_on_disk,
        otherwise=_DISK,
    ),
    no_effect(f"{_OFFLOAD}.pipeline_read", "ds-offload", _OVERLAP),
    no_effect(f"{_OFFLOAD}.pipeline_write", "ds-offload", _OVERLAP),
    no_effect(f"{_OFFLOAD}.fast_init", "ds-offload", "states that were never written are never read"),
    no_effect(
        f"{_PARAM}.buffer_count", "ds-offload", "parameters are read into the memory in which they are used"
    ),
    no_effect(
        f"{_PARAM}.buffer_size", "ds-offload", "parameters are read into the memory in which they are used"
    ),
    works(
        f"{_PARAM}.max_in_cpu",
        "ds-offload",
        "ds_offload.TiersByKind(max_in_cpu=...)",
        only=_params_on_disk,
        otherwise=_DISK,
    ),
    works(
        f"{_PARAM}.pin_memory",
        "ds-offload",
        "ds_offload.HostStore(pin=...)",
        only=_only_params,
        otherwise="no parameters are offloaded, or offload_optimizer.pin_memory decides",
    ),
    works(
        f"{_OFFLOAD}.cpuadam_cores_perc",
        "ds-offload",
        "ds_offload.CPUAdam.cores",
        only=_on_host,
        otherwise="nothing is offloaded to host memory",
    ),
    no_effect(f"{_ZERO}.sub_group_size", "ds-zero", "states on a disk are read in pages of 64 MiB"),
    no_effect(f"{_ZERO}.contiguous_gradients", "ds-zero", "gradients always go into contiguous buckets"),
    no_effect(
        f"{_ZERO}.use_multi_rank_bucket_allreduce",
        "ds-zero",
        "one message always contains the parts of all ranks",
    ),
    no_effect(
        f"{_ZERO}.allgather_partitions", "ds-zero", "updated parameters are always gathered by all-gather"
    ),
    no_effect(f"{_ZERO}.round_robin_gradients", "ds-zero", "every rank copies only its own part to the host"),
    no_effect(
        f"{_ZERO}.compute_grad_norm",
        "ds-zero",
        "the norm is always computed, because it decides whether a step is skipped",
    ),
    no_effect(f"{_ZERO}.parameter_alignment", "ds-zero", "buffers are always aligned"),
    no_effect(f"{_ZERO}.elastic_checkpoint", "ds-engine", "every checkpoint loads on any number of ranks"),
    no_effect(
        f"{_ZERO}.pipeline_loading_checkpoint", "ds-engine", "a rank reads only the ranges that it needs"
    ),
    no_effect(f"{_ZERO}.memory_efficient_linear", "ds-zero", "no layer saves gathered weights for backward"),
    no_effect(f"{_ZERO}.override_module_apply", "ds-zero", "ds_zero.deferred_init always does it"),
    no_effect(f"{_ZERO}.log_trace_cache_warnings", "ds-zero", "there is no cache of the order of modules"),
    no_effect(f"{_ZERO}.enable_sanity_checks", "ds-zero", "the checks are always on"),
    no_effect(
        f"{_ZERO}.save_muon_momentum_buffer_in_memory",
        "ds-offload",
        "Muon's momentum is read from the disk while other matrices are stepped, as all states are",
    ),
    no_effect(
        f"{_ZERO}.stage3_use_all_reduce_for_fetch_params",
        "ds-zero",
        "gathers need no copy that it would save",
    ),
    no_effect(f"{_ZERO}.stage3_allgather_sequential", "ds-zero", "gathers need no copy that it would save"),
)
