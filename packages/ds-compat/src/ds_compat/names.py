"""Maps DeepSpeed's names to their implementations.

Module below `deepspeed` ("" for itself) -> home -> names; `there=here` where they differ. A text instead of a
dictionary: the whole module is one of ours. tests/compat/test_names.py looks up every entry.
"""

from __future__ import annotations

from collections.abc import Mapping

VERSION = "0.19.8+ds"
"""The version whose names these are, for comparisons; `+ds` tells that it is not that one."""

_CONFIG = "ds_compat.config.deepspeed_config"
_SECTIONS = "ds_compat.config.sections"
_ELASTIC = "ds_compat.config.elasticity"
_INFERENCE = "ds_compat.engine.inference"
_LOGS = "ds_compat.utils.logs"
_HOST_OPS = "ds_compat.ops.host"
_OPS = "ds_compat.ops.optimizers"
_NESTED = "ds_compat.utils.nested"
_PARAMS = "ds_compat.zero.params"
_REFUSED = "ds_compat.refused"
_TILING = "ds_compat.zero.tiling"
_UTILS = "ds_compat.utils.functions"
_ZERO = "ds_compat.zero.construction"

_ELASTIC_ERRORS = "ElasticityError ElasticityConfigError ElasticityIncompatibleWorldSize"
_ELASTIC_CONSTANTS = (
    "ELASTICITY ENABLED ENABLED_DEFAULT DEEPSPEED_ELASTICITY_CONFIG MINIMUM_DEEPSPEED_VERSION "
    "LATEST_ELASTICITY_VERSION MAX_ACCEPTABLE_BATCH_SIZE MICRO_BATCHES VERSION MIN_GPUS MAX_GPUS NUM_GPUS_PER_NODE "
    "MODEL_PARALLEL_SIZE MIN_TIME PREFER_LARGER_BATCH IGNORE_NON_ELASTIC_BATCH_INFO"
)
_OPTIMIZERS = {
    "adam": {
        _OPS: "FusedAdam",
        _HOST_OPS: "DeepSpeedCPUAdam",
        _REFUSED: "ZenFlowCPUAdam ZenFlowSelectiveAdamW",
    },
    "adagrad": {_HOST_OPS: "DeepSpeedCPUAdagrad"},
    "lamb": {_OPS: "FusedLamb"},
    "lion": {_OPS: "FusedLion", _HOST_OPS: "DeepSpeedCPULion"},
}
_LEAVES = (
    "set_z3_leaf_modules unset_z3_leaf_modules get_z3_leaf_modules z3_leaf_module z3_leaf_parameter "
    "set_z3_leaf_module set_z3_leaf_modules_by_name set_z3_leaf_modules_by_suffix"
)
_FRAGMENTS = (
    "safe_get_full_fp32_param safe_get_full_grad safe_get_full_optimizer_state safe_set_full_fp32_param "
    "safe_set_full_grad safe_set_full_optimizer_state safe_get_local_fp32_param safe_get_local_grad "
    "safe_get_local_optimizer_state safe_set_local_fp32_param safe_set_local_grad "
    "safe_set_local_optimizer_state safe_update_full_grad_vectorized"
)
_PARTITION = {
    _ZERO: "Init GatheredParameters register_external_parameter unregister_external_parameter shutdown_init_context "
    "restore_init_context",
    _PARAMS: "ZeroParamType ZeroParamStatus is_zero_param",
    _UTILS: "zero_wrapper_for_fp_tensor_constructor _orig_torch_arange partitioned_param_data_shape",
    "ds_compat.device": "get_accelerator",
    _REFUSED: "CUDAQuantizer MultipleAllGatherHandles",
}
_OFFLOAD = "DeepSpeedZeroOffloadParamConfig DeepSpeedZeroOffloadOptimizerConfig OffloadDeviceEnum OffloadStateTypeEnum"
_RUNTIME_UTILS = (
    "set_random_seed ensure_directory_exists noop_decorator call_to_str partition_uniform get_only_unique_item "
    "clip_grad_norm_ get_global_norm has_inf_or_nan empty_cache"
)
_GATES = (
    "top1gating top2gating topkgating _route_slots _sparse_decode _sparse_encode TopKGate MOELayer Experts"
)
_FLOPS = (
    "FlopsProfiler get_model_profile number_to_string flops_to_string macs_to_string params_to_string "
    "duration_to_string"
)
_CONSTANTS = (
    "ADAM_OPTIMIZER ADAMW_OPTIMIZER LAMB_OPTIMIZER ADAGRAD_OPTIMIZER LION_OPTIMIZER SGD_OPTIMIZER "
    "MUON_OPTIMIZER"
)

MODULES: Mapping[str, Mapping[str, str] | str] = {
    "": {
        "ds_compat.engine.initialize": "initialize add_config_arguments",
        "ds_compat.engine.tensor_parallel": "tp_model_init",
        "ds_compat.comm.collectives": "init_distributed",
        "ds_compat.engine.engine": "DeepSpeedEngine",
        "ds_compat.engine.optimizer": "DeepSpeedOptimizer ZeROOptimizer",
        "ds_compat.engine.dataloader": "DeepSpeedDataLoader",
        "ds_compat.device": "get_accelerator",
        "ds_compat.zero.on_device": "OnDevice",
        _CONFIG: "DeepSpeedConfig DeepSpeedConfigError TORCH_DISTRIBUTED_DEFAULT_PORT " + _CONSTANTS,
        _LOGS: "logger log_dist",
        "ds_compat.engine.lr_schedules": "add_tuning_arguments",
        _UTILS: "version git_hash git_branch __git_hash__=git_hash __git_branch__=git_branch HAS_TRITON dist "
        "__version_major__ __version_minor__ __version_patch__",
        _INFERENCE: "init_inference default_inference_config DeepSpeedInferenceConfig InferenceEngine",
        "ds_compat.pipe.engine": "PipelineEngine",
        "ds_compat.pipe.module": "PipelineModule",
        _REFUSED: "DeepSpeedHybridEngine set_autotp_mode "
        "DeepSpeedTransformerLayer "
        "DeepSpeedTransformerConfig replace_transformer_layer DualPipeVEngine DualPipeVModule",
    },
    "accelerator": {
        "ds_compat.device": "get_accelerator is_current_accelerator_supported DeepSpeedAccelerator",
    },
    "accelerator.abstract_accelerator": {"ds_compat.device": "DeepSpeedAccelerator"},
    "accelerator.real_accelerator": {"ds_compat.device": "get_accelerator"},
    "autotuning": {_REFUSED: "Autotuner"},
    "autotuning.autotuner": {_REFUSED: "Autotuner"},
    "autotuning.scheduler": {_REFUSED: "ResourceManager"},
    "autotuning.utils": {_NESTED: "get_val_by_key set_val_by_key"},
    "checkpoint": {"ds_compat.checkpoint.files": "get_model_ckpt_name_for_rank get_zero_ckpt_name_for_rank"},
    "checkpoint.ds_to_universal": {_REFUSED: "main=ds_to_universal"},
    "checkpoint.utils": {
        "ds_compat.checkpoint.files": "get_model_ckpt_name_for_rank get_zero_ckpt_name_for_rank",
        _NESTED: "clone_tensors_for_torch_save",
    },
    "comm": "ds_compat.comm.collectives",
    "comm.comm": "ds_compat.comm.collectives",
    "comm.reduce_op": {"torch.distributed": "ReduceOp"},
    "comm.torch": "ds_compat.comm.collectives",
    "compression": {_REFUSED: "init_compression redundancy_clean"},
    "constants": {_CONFIG: "TORCH_DISTRIBUTED_DEFAULT_PORT"},
    "elasticity": {
        _ELASTIC: "compute_elastic_config elasticity_enabled ensure_immutable_elastic_config ELASTICITY ENABLED "
        "ENABLED_DEFAULT"
    },
    "elasticity.config": {_ELASTIC: f"{_ELASTIC_ERRORS} {_ELASTIC_CONSTANTS}"},
    "elasticity.constants": {_ELASTIC: _ELASTIC_CONSTANTS},
    "elasticity.elasticity": {
        _ELASTIC: "compute_elastic_config elasticity_enabled ensure_immutable_elastic_config "
        + _ELASTIC_ERRORS
    },
    "env_report": {"ds_compat.launch.report": "main cli_main=main"},
    "git_version_info": {
        _UTILS: "version git_hash git_branch installed_ops compatible_ops",
        "ds_compat.device": "torch_info",
    },
    "inference": {_INFERENCE: "InferenceEngine"},
    "inference.config": {_INFERENCE: "DeepSpeedInferenceConfig"},
    "inference.engine": {_INFERENCE: "InferenceEngine"},
    "launcher": {},
    "launcher.launch": {"ds_compat.launch.node": "main parse_args"},
    "launcher.multinode_runner": {
        "ds_compat.launch.runners": "MultiNodeRunner PDSHRunner OpenMPIRunner SlurmRunner MPICHRunner IMPIRunner "
        "MVAPICHRunner"
    },
    "launcher.runner": {
        "ds_compat.launch.hostfile": "fetch_hostfile _parse_hostfile=parse_hostfile",
        "ds_compat.launch.launcher": "main parse_args encode_world_info parse_resource_filter "
        "parse_inclusion_exclusion DEEPSPEED_ENVIRONMENT_NAME DLTS_HOSTFILE EXPORT_ENVS",
    },
    "linear": {_REFUSED: "LoRAConfig QuantizationConfig OptimizedLinear LoRAOptimizedLinear init_lora"},
    "linear.config": {_REFUSED: "LoRAConfig QuantizationConfig"},
    "linear.optimized_linear": {_REFUSED: "OptimizedLinear LoRAOptimizedLinear"},
    "module_inject": {_REFUSED: "replace_transformer_layer set_autotp_mode"},
    "module_inject.layers": {
        _REFUSED: "LinearAllreduce LinearLayer LmHeadLinearAllreduce set_autotp_mode",
        _UTILS: "is_autotp_training_mode",
    },
    "module_inject.tp_shard": {_REFUSED: "get_shard_size_list get_shard_size"},
    "moe": {"ds_moe.deepspeed.layer": "MoE"},
    "moe.experts": {_REFUSED: "Experts"},
    "moe.layer": {"ds_moe.deepspeed.layer": "MoE"},
    "moe.sharded_moe": {_REFUSED: _GATES},
    "moe.utils": {
        "ds_moe.deepspeed.utils": "is_moe_param has_moe_layers split_params_into_different_moe_groups_for_optimizer "
        "configure_moe_param_groups",
    },
    "monitor": {},
    "ops": {"ds_compat.ops.builders": "__compatible_ops__=COMPATIBLE"},
    "ops.adagrad": _OPTIMIZERS["adagrad"],
    "ops.adagrad.cpu_adagrad": _OPTIMIZERS["adagrad"],
    "ops.adam": _OPTIMIZERS["adam"],
    "ops.adam.cpu_adam": {_HOST_OPS: "DeepSpeedCPUAdam"},
    "ops.adam.fused_adam": {_OPS: "FusedAdam"},
    "ops.aio": {"ds_compat.ops.builders": "AsyncIOBuilder", "ds_compat.ops.aio": "aio_handle"},
    "ops.lamb": _OPTIMIZERS["lamb"],
    "ops.lamb.fused_lamb": _OPTIMIZERS["lamb"],
    "ops.lion": _OPTIMIZERS["lion"],
    "ops.lion.cpu_lion": {_HOST_OPS: "DeepSpeedCPULion"},
    "ops.lion.fused_lion": {_OPS: "FusedLion"},
    "ops.op_builder": "ds_compat.ops.builders",
    "ops.op_builder.all_ops": {"ds_compat.ops.builders": "ALL_OPS"},
    "ops.op_builder.builder": {"ds_compat.ops.builders": "OpBuilder"},
    "ops.sparse_attention": {
        "ds_layers.sparse": "SparseSelfAttention SparsityConfig DenseSparsityConfig FixedSparsityConfig "
        "VariableSparsityConfig BigBirdSparsityConfig BSLongformerSparsityConfig LocalSlidingWindowSparsityConfig "
        "SparseAttentionUtils"
    },
    "ops.transformer": {_REFUSED: "DeepSpeedTransformerLayer DeepSpeedTransformerConfig"},
    "pipe": {"ds_compat.pipe.module": "PipelineModule LayerSpec TiedLayerSpec"},
    "profiling": {},
    "profiling.flops_profiler": {"ds_compat.profiling": _FLOPS},
    "profiling.flops_profiler.profiler": {"ds_compat.profiling": _FLOPS},
    "runtime": {"ds_compat.engine.optimizer": "DeepSpeedOptimizer ZeROOptimizer"},
    "runtime.activation_checkpointing": {},
    "runtime.activation_checkpointing.checkpointing": "ds_compat.engine.activation_checkpointing",
    "checkpointing": "ds_compat.engine.activation_checkpointing",
    "runtime.base_optimizer": {"ds_compat.engine.optimizer": "DeepSpeedOptimizer ZeROOptimizer"},
    "runtime.bf16_optimizer": {"ds_compat.engine.optimizer": "BF16_Optimizer"},
    "runtime.config": {
        _CONFIG: "DeepSpeedConfig DeepSpeedConfigError get_gradient_clipping get_log_level " + _CONSTANTS,
    },
    "runtime.config_utils": {
        _SECTIONS: "DeepSpeedConfigModel",
        _CONFIG: "dict_raise_error_on_duplicate_keys get_scalar_param",
    },
    "runtime.constants": {
        _CONFIG: "GRADIENT_CLIPPING GRADIENT_CLIPPING_DEFAULT LOG_LEVEL LOG_LEVEL_DEFAULT ROUTE_TRAIN ROUTE_EVAL "
        "ROUTE_PREDICT TRAIN_BATCH_SIZE TRAIN_MICRO_BATCH_SIZE_PER_GPU GRADIENT_ACCUMULATION_STEPS",
    },
    "runtime.data_pipeline": {},
    "runtime.data_pipeline.data_routing": {},
    "runtime.data_pipeline.data_routing.helper": {"ds_compat.engine.dataloader": "convert_to_random_ltd"},
    "runtime.data_pipeline.data_sampling": {},
    "runtime.data_pipeline.data_sampling.data_analyzer": {_REFUSED: "DataAnalyzer"},
    "runtime.data_pipeline.data_sampling.data_sampler": {_REFUSED: "DeepSpeedDataSampler"},
    "runtime.dataloader": {"ds_compat.engine.dataloader": "DeepSpeedDataLoader RepeatingLoader"},
    "runtime.engine": {
        "ds_compat.engine.engine": "DeepSpeedEngine",
        _CONFIG: "ADAM_OPTIMIZER LAMB_OPTIMIZER MUON_OPTIMIZER",
        _UTILS: "DeepSpeedOptimizerCallable DeepSpeedSchedulerCallable",
    },
    "runtime.fp16": {},
    "runtime.fp16.fused_optimizer": {"ds_compat.engine.optimizer": "FP16_Optimizer"},
    "runtime.fp16.onebit": {"ds_compat.ops.onebit": "OnebitAdam OnebitLamb ZeroOneAdam"},
    "runtime.fp16.onebit.adam": {"ds_compat.ops.onebit": "OnebitAdam"},
    "runtime.fp16.onebit.lamb": {"ds_compat.ops.onebit": "OnebitLamb"},
    "runtime.fp16.onebit.zoadam": {"ds_compat.ops.onebit": "ZeroOneAdam"},
    "runtime.fp16.unfused_optimizer": {"ds_compat.engine.optimizer": "FP16_UnfusedOptimizer"},
    "runtime.hybrid_engine": {_REFUSED: "DeepSpeedHybridEngine"},
    "runtime.lr_schedules": "ds_compat.engine.lr_schedules",
    "runtime.pipe": {"ds_compat.pipe.module": "PipelineModule LayerSpec TiedLayerSpec"},
    "runtime.pipe.engine": {"ds_compat.pipe.engine": "PipelineEngine PipelineError"},
    "runtime.pipe.module": {"ds_compat.pipe.module": "PipelineModule LayerSpec TiedLayerSpec"},
    "runtime.pipe.schedule": {_REFUSED: "TrainSchedule InferenceSchedule DataParallelSchedule"},
    "runtime.pipe.topology": {
        "ds_pipe.model": "ProcessTopology PipeDataParallelTopology PipeModelDataParallelTopology",
        "ds_compat.pipe.grid": "PipelineParallelGrid",
        _REFUSED: "_prime_factors",
    },
    "runtime.precision_config": {
        _SECTIONS: "DeepSpeedFP16Config DeepSpeedBF16Config get_bfloat16_config get_float16_config",
    },
    "runtime.sequence_parallel": {},
    "runtime.sequence_parallel.parallel_state_sp": {
        "ds_compat.comm.groups": "get_sequence_parallel_group=_get_sequence_parallel_group "
        "get_sequence_parallel_rank=_get_sequence_parallel_rank "
        "get_sequence_parallel_world_size=_get_sequence_parallel_world_size",
        "ds_compat.sequence.groups": "initialize_sequence_parallel",
    },
    "runtime.sequence_parallel.ulysses_sp": {
        "ds_compat.sequence.transformers": "UlyssesSPAttentionHF UlyssesSPDataLoaderAdapter",
        "ds_compat.sequence.tiles": "TiledMLP TiledFusedLogitsLoss sequence_tiled_compute",
    },
    "runtime.utils": {
        _LOGS: "see_memory_usage",
        "ds_compat.checkpoint.files": "is_model_parallel_parameter",
        _UTILS: _RUNTIME_UTILS,
        _NESTED: "move_to_device",
    },
    "runtime.zenflow": {},
    "runtime.zenflow.zenflow_config": {_REFUSED: "ZenFlowConfig"},
    "runtime.zero": {
        _ZERO: "Init GatheredParameters register_external_parameter unregister_external_parameter "
        "unwrap_model_for_generation",
        _TILING: "TiledLinear TiledLinearReturnBias",
        _PARAMS: "ZeroParamType ZeroParamStatus",
    },
    "runtime.zero.config": {
        _SECTIONS: "DeepSpeedZeroConfig ZeroStageEnum get_zero_config " + _OFFLOAD,
    },
    "runtime.zero.leaf_module_config": {
        _SECTIONS: "DEFAULT_LEAF_MODULE_CLASSES DEFAULT_LEAF_MODULE_NAMES DEFAULT_LEAF_MODULE_NAME_SUFFIXES "
        "DeepSpeedZeroLeafModuleConfig",
    },
    "runtime.zero.offload_config": {_SECTIONS: _OFFLOAD},
    "runtime.zero.partition_parameters": _PARTITION,
    "runtime.zero.stage3": {
        "ds_compat.engine.optimizer": "DeepSpeedZeroOptimizer_Stage3",
        _ZERO: "unwrap_model_for_generation",
        "ds_compat.zero.estimates": "estimate_zero3_model_states_mem_needs "
        "estimate_zero3_model_states_mem_needs_all_live estimate_zero3_model_states_mem_needs_all_cold",
    },
    "runtime.zero.stage_1_and_2": {
        "ds_compat.engine.optimizer": "DeepSpeedZeroOptimizer",
        "ds_compat.zero.estimates": "estimate_zero2_model_states_mem_needs "
        "estimate_zero2_model_states_mem_needs_all_live estimate_zero2_model_states_mem_needs_all_cold",
    },
    "runtime.zero.tiling": {_TILING: "TiledLinear TiledLinearReturnBias"},
    "runtime.zero.utils": {
        _CONFIG: "ZeRORuntimeException",
        _UTILS: "is_zero_supported_optimizer",
    },
    "sequence": {},
    "sequence.fpdt_layer": {_REFUSED: "FPDT_InputConstruct _FPDTGPUOffloadingAttentionImpl_"},
    "sequence.cross_entropy": {"ds_compat.sequence.losses": "vocab_sequence_parallel_cross_entropy"},
    "sequence.layer": {
        "ds_compat.sequence.attention": "DistributedAttention",
        _REFUSED: "_SeqAllToAll _rotate_half _torchembed_available apply_rotary_pos_emb",
    },
    "utils": {
        _LOGS: "logger log_dist log_dist_once set_log_level_from_string",
        "ds_compat.zero.on_device": "OnDevice",
        "ds_compat.engine.dataloader": "RepeatingLoader",
        "ds_compat.zero.leaf_modules": _LEAVES,
        "ds_compat.zero.fragments": _FRAGMENTS,
        _UTILS: "instrument_w_nvtx get_caller_func",
        _NESTED: "recursive_getattr recursive_setattr",
        "torch.distributed": "is_initialized",
    },
    "utils.groups": "ds_compat.comm.groups",
    "utils.init_on_device": {"ds_compat.zero.on_device": "OnDevice"},
    "utils.logging": "ds_compat.utils.logs",
    "utils.numa": {_UTILS: "parse_range_list"},
    "utils.nvtx": {_UTILS: "instrument_w_nvtx"},
    "utils.tensor_fragment": {"ds_compat.zero.fragments": _FRAGMENTS},
    "runtime.zero.tensor_fragment": {"ds_compat.zero.fragments": _FRAGMENTS},
    "utils.timer": {"ds_compat.utils.timer": "ThroughputTimer"},
    "utils.torch": {_UTILS: "required_torch_version"},
    "utils.types": {},
    "utils.z3_leaf_module": {"ds_compat.zero.leaf_modules": _LEAVES},
    "utils.zero_to_fp32": "ds_compat.zero_to_fp32",
    "zero": {
        _ZERO: "Init GatheredParameters register_external_parameter unregister_external_parameter "
        "unwrap_model_for_generation",
        _TILING: "TiledLinear TiledLinearReturnBias",
        _PARAMS: "ZeroParamType ZeroParamStatus",
        _SECTIONS: "DeepSpeedZeroConfig",
        _UTILS: "partition_parameters",
    },
}
