"""Rows of the top level and of all sections but `zero_optimization`."""

from __future__ import annotations

from ds_engine.config.built.row import Row, gone, later, no_effect, works

_LAYERS = "ds-layers"
_LTD = "data_efficiency.data_routing.random_ltd"
_ENGINE = "ds-engine"

_ON_DISK = {
    "only": lambda config: (
        config.zero_optimization.offload_optimizer.device == "nvme"
        or config.zero_optimization.offload_param.device == "nvme"
        or config.activation_offload.device == "nvme"
        or (config.offload.budget is not None and config.offload.budget.nvme_path is not None)
    ),
    "otherwise": "nothing is offloaded to a disk",
}

_BUDGET = {
    "only": lambda config: config.offload.budget is not None,
    "otherwise": "there is no budget",
}

WORKING: tuple[Row, ...] = (
    works(
        "offload.budget",
        "ds-offload",
        "ds_offload.budget",
        needs="ds_offload",
        switches={"offload.budget": ()},
    ),
    works("offload.rates", "ds-offload", "ds_offload.budget", **_BUDGET),
    *(
        works(
            key,
            _ENGINE,
            "ds_engine.config.support.batch",
            only=lambda config: not config.elasticity.enabled,
            otherwise="the section elasticity chooses the batch sizes",
        )
        for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    ),
    works("elasticity", _ENGINE, "ds_engine.config.elastic"),
    works("integrity.replica_check_interval", "ds-zero", "ds_zero.check_replicas"),
    works("integrity.message_checksums", "ds-comm", "ds_comm.collectives(checked=True)"),
    works("integrity.checksums", "ds-zero", "ds_zero.ZeroConfig.checksums"),
    works("aio.block_size", "ds-offload", "NVMeOptions.block_bytes", **_ON_DISK),
    works("aio.queue_depth", "ds-offload", "NVMeOptions.queue_depth", **_ON_DISK),
    works("aio.intra_op_parallelism", "ds-offload", "NVMeOptions.num_threads", **_ON_DISK),
    works("aio.verify", "ds-offload", "NVMeOptions.verify", **_ON_DISK),
    works("pipeline.stages", _ENGINE, "ds_engine.rules: the number of stages of the model"),
    works("pipeline.activation_checkpoint_interval", "ds-pipe", "PipelineModule.recompute_every"),
    works("pipeline.schedule", "ds-pipe", "PipelineOptions.schedule"),
    works("pipeline.receive_ahead", "ds-pipe", "PipelineOptions.receive_ahead"),
    works("pipeline.max_unsharded", "ds-pipe", "PipelineOptions.max_unsharded"),
    works("pipeline.timeout_s", "ds-pipe", "PipelineOptions.timeout_s"),
    works("managed_gradient_accumulation", _ENGINE, "ds_engine.training.accumulation"),
    works("sparse_gradients", "ds-zero", "ds_zero.runtime.gradients.sparse_rows"),
    works("optimizer", _ENGINE, "ds_engine.build.optimizer"),
    works("scheduler", _ENGINE, "ds_engine.schedules"),
    works("fp16", "ds-zero", "ds_zero.LossScaler and ZeroConfig.param_dtype"),
    works("bf16.enabled", _ENGINE, "ds_engine.job.precision"),
    works("bf16.check_grad_overflow", _ENGINE, "ds_engine.job.precision"),
    works("bf16.bf16_optimizer_states", "ds-core", "state_dtype of our optimizers"),
    works("torch_autocast", _ENGINE, "ds_engine.job.precision"),
    works("data_types", "ds-zero", "ds_engine.job.precision and ZeroConfig.grad_dtype"),
    works("prescale_gradients", "ds-zero", "ZeroConfig.predivide_factor"),
    works(
        "gradient_predivide_factor",
        "ds-zero",
        "ZeroConfig.predivide_factor",
        only=lambda config: not config.prescale_gradients,
        otherwise="prescale_gradients is true",
    ),
    works("gradient_allreduce_op", "ds-zero", "ZeroConfig.reduce_op"),
    works("communication_data_type", "ds-zero", "ZeroConfig.communication_dtype"),
    works("local_sgd", "ds-comm", "ds_comm.optim.LocalSGD"),
    works("links", "ds-comm", "build/links.py"),
    works("gradient_clipping", _ENGINE, "ds_zero.clip_grad_norm_"),
    works("steps_per_print", _ENGINE, "ds_engine.training.progress"),
    works("dump_state", _ENGINE, "ds_engine.assemble"),
    works("vocabulary_size", _ENGINE, "ds_engine.config.load.loader"),
    *(
        works(
            f"tensor_parallel.{name}",
            _LAYERS,
            "ds_engine.build.layers.tensor",
            needs="ds_layers",
            remedy="set autotp_size to 1",
            switches={f"tensor_parallel.{name}": (0, 1)},
        )
        for name in ("autotp_size", "tp.tp_size")
    ),
    *(
        works(f"tensor_parallel.{name}", _LAYERS, "ds_engine.build.layers.tensor")
        for name in ("partition_config", "vocab_parallel_lm_head", "sequence_parallel_norms")
    ),
    works(
        "sparse_attention",
        _LAYERS,
        "ds_engine.build.layers",
        needs="ds_layers",
        remedy="remove the section",
        switches={"sparse_attention": (None,)},
    ),
    works(
        "sequence_parallel_size",
        _LAYERS,
        "ds_engine.build.topology",
        needs="ds_layers",
        remedy="set it to 1",
        switches={"sequence_parallel_size": (1,)},
    ),
    works("data_parallel_size", _ENGINE, "ds_engine.config.sections.model"),
    works("dataloader_drop_last", _ENGINE, "ds_engine.build.data"),
    works("checkpoint.keep_last", _ENGINE, "ds_engine.checkpoint"),
    works("wall_clock_breakdown", _ENGINE, "ds_engine.training.timing"),
    works("memory_breakdown", _ENGINE, "ds_engine.training.timing"),
    works("tensorboard", _ENGINE, "ds_engine.training.monitor"),
    works("csv_monitor", _ENGINE, "ds_engine.training.monitor"),
    works("wandb", _ENGINE, "ds_engine.training.monitor"),
    works("comet", _ENGINE, "ds_engine.training.monitor"),
    works("curriculum_learning", _ENGINE, "ds_engine.training.pacing"),
    works("progressive_layer_drop", _ENGINE, "ds_engine.training.pacing"),
    works(
        "activation_checkpointing",
        _LAYERS,
        "Engine.activation_checkpointing and deepspeed.checkpointing.configure",
        needs="ds_layers",
        remedy="set it to false, and use torch.utils.checkpoint",
        switches={
            f"activation_checkpointing.{name}": (False,)
            for name in (
                "partition_activations",
                "cpu_checkpointing",
                "contiguous_memory_optimization",
                "synchronize_checkpoint_boundary",
                "profile",
            )
        },
    ),
    works(
        "activation_offload.device",
        "ds-offload",
        "ds_offload.ActivationOffload",
        needs="ds_offload",
        switches={"activation_offload.device": ("none",)},
    ),
    *(
        works(
            f"activation_offload.{name}",
            "ds-offload",
            f"ds_offload.ActivationOptions.{name}",
            only=lambda config: config.moves_activations,
            otherwise="activations stay on the device",
        )
        for name in ("min_bytes", "budget_bytes", "prefetch_bytes", "max_host_bytes")
    ),
    works(
        "activation_offload.nvme_path",
        "ds-offload",
        "ds_offload.ActivationOptions.nvme_path",
        only=lambda config: config.activation_offload.device == "nvme",
        otherwise="no activations are moved to a disk",
    ),
    works(
        "activation_offload.layers",
        "ds-offload",
        "ds_offload.ActivationOffload.attach(layers=...)",
        only=lambda config: config.moves_activations,
        otherwise="activations stay on the device",
    ),
    works("checkpoint.memory_copies", _ENGINE, "ds_checkpoint.MemoryCopies"),
    works("checkpoint.writer.decoupled", _ENGINE, "ds_engine.checkpoint"),
    works("data_efficiency", _ENGINE, "ds_engine.sampling"),
    works(
        "data_efficiency.data_routing",
        _LAYERS,
        "ds_engine.training.pacing",
        needs="ds_layers",
        remedy="set it to false",
        switches={"data_efficiency.data_routing.enabled": (False,)},
    ),
    works("zero_force_ds_cpu_optimizer", _ENGINE, "ds_engine.rules"),
    works("seed", _ENGINE, "ds_engine.assemble"),
    works("startup_summary", _ENGINE, "ds_engine.training.startup_summary"),
)

EFFECTLESS: tuple[Row, ...] = (
    *(
        no_effect(
            f"pipeline.{key}", "ds-pipe", "PipelineModule has constructed and divided the layers already"
        )
        for key in ("partition", "seed_layers")
    ),
    *(
        no_effect(f"pipeline.{key}", "ds-pipe", "stages send whole tensors")
        for key in ("pipe_partitioned", "grad_partitioned")
    ),
    no_effect(
        "pipeline.use_reentrant", "ds-pipe", "recomputation is never reentrant, and gives the same values"
    ),
    no_effect("elasticity.min_time", _ENGINE, "the scheduler decides how long a job runs"),
    no_effect("checkpoint.load_universal", _ENGINE, "load_checkpoint detects the format"),
    no_effect("optimizer.legacy_fusion", _ENGINE, "the fused step has one code path"),
    no_effect("disable_allgather", "ds-zero", "updated parameters are always gathered by all-gather"),
    no_effect(
        "zero_allow_untested_optimizer",
        "ds-zero",
        "unknown optimizers are tested on a small tensor instead",
    ),
    no_effect(
        "seq_parallel_communication_data_type",
        _LAYERS,
        "gradients of sequence-parallel ranks are reduced together with those of data-parallel ranks",
    ),
    no_effect(
        "log_level", _ENGINE, "there is no logger: steps_per_print and startup_summary control the output"
    ),
    no_effect(
        "timers",
        _ENGINE,
        "the progress lines of steps_per_print contain the speed, which is measured without synchronisation",
    ),
    no_effect("aio.use_gds", "ds-offload", "copies between disk and GPU always go through host memory"),
    no_effect("aio.single_submit", "ds-offload", "requests are always submitted in batches"),
    no_effect("aio.overlap_events", "ds-offload", "new requests are always submitted while others complete"),
    no_effect("checkpoint.tag_validation", _ENGINE, "different tags are always an error"),
    no_effect("checkpoint.parallel_write", _ENGINE, "every rank always writes its own part"),
    no_effect("checkpoint.checkpoint_serialization", _ENGINE, "nothing is pickled"),
    no_effect("checkpoint.writer", _ENGINE, "there is only one writer, which writes in blocks"),
)

NOT_YET: tuple[Row, ...] = (
    no_effect(
        "bf16.immediate_grad_update", "ds-zero", "gradients are always added as soon as they are computed"
    ),
    later("disable_python_gc", _ENGINE, "garbage collection between steps", "call gc.disable() yourself"),
    later(
        "use_data_before_expert_parallelism",
        "ds-moe",
        "ranks of other experts that are not consecutive",
    ),
    later(
        "checkpoint.use_node_local_storage",
        _ENGINE,
        "checkpoint files on node-local storage",
        "save to a shared directory",
    ),
    later(
        "checkpoint.writer.type",
        _ENGINE,
        "a writer that writes nothing",
        "remove it",
        switches={"checkpoint.writer.type": ("python", "fast", None)},
    ),
    no_effect(
        "activation_checkpointing.number_checkpoints",
        _LAYERS,
        "the number is counted in the first step",
    ),
    works(
        "flops_profiler",
        "ds-profiler",
        "build/profiler.py",
        switches={"flops_profiler.enabled": (False,)},
        needs="ds_profiler",
    ),
    works("comms_logger", "ds-comm", "build/comm.py"),
    works("stall_reports", "ds-comm", "build/stalls.py"),
    no_effect(
        "data_efficiency.data_sampling.curriculum_learning.data_cluster_path",
        _ENGINE,
        "lists of samples are computed from the index and the seed, so none are stored",
    ),
    no_effect(f"{_LTD}.micro_batch_size", _ENGINE, "it works with any batch size"),
    no_effect(f"{_LTD}.global_batch_size", _ENGINE, "it works with any batch size"),
    later(
        f"{_LTD}.layer_token_lr_schedule",
        _ENGINE,
        "learning rates that follow the number of processed tokens",
    ),
    *(
        no_effect(f"tensor_parallel.{name}", _LAYERS, why)
        for name, why in (
            ("dtype", "the sections fp16 and bf16 decide about dtypes"),
            ("tp_overlap_comm", "collectives run on the stream of the computation"),
            ("preset_model", "the plan is that of the model's own class"),
            ("keep_module_on_host", "the model is on the device of the job"),
            ("tp.tp_grain_size", "layers are divided in parts of equal size"),
            ("vocab_parallel_ce_backend", "ds_layers.tensor.vocab_parallel_cross_entropy is torch code"),
        )
    ),
    *(
        later(f"tensor_parallel.{name}", _LAYERS, what, remedy)
        for name, what, remedy in (
            (
                "tp.mpu",
                "process groups of tensor parallelism in the configuration",
                "pass mpu to initialize()",
            ),
            (
                "tp.tp_group",
                "process groups of tensor parallelism in the configuration",
                "pass mpu to initialize()",
            ),
            ("injection_policy_tuple", "names of layers whose outputs are summed", "use partition_config"),
            ("replace_with_kernel_inject", "inference kernels in training", "set it to false"),
        )
    ),
    works("autotuning", _ENGINE, "training/trial.py"),
    *(
        no_effect(f"autotuning.{name}", _ENGINE, why)
        for name, why in (
            ("tuner_type", "candidates are tried in the order of predictions, corrected by every trial"),
            ("tuner_early_stopping", "the search ends when predictions say that nothing can be faster"),
            ("num_tuning_micro_batch_sizes", "all powers of two are candidates, of which few are tried"),
            ("model_info", "the first trial measures the model"),
            ("model_info_path", "the first trial measures the model"),
            ("mp_size", "model-parallel ranks are counted by the script"),
            ("num_nodes", "trials run on this machine"),
            ("num_gpus", "trials have the ranks of the launcher"),
            ("metric", "samples per second decide; step times are in the result, too"),
        )
    ),
    later("hybrid_engine", _ENGINE, "the hybrid engine"),
    later(
        "compression_training",
        _LAYERS,
        "quantisation and pruning",
        switches={
            f"compression_training.{name}.shared_parameters.enabled": (False,)
            for name in (
                "weight_quantization",
                "activation_quantization",
                "sparse_pruning",
                "row_pruning",
                "head_pruning",
                "channel_pruning",
            )
        }
        | {"compression_training.layer_reduction.enabled": (False,)},
    ),
    later("weight_quantization", _LAYERS, "quantised weights for inference", "remove the section"),
    later(
        "datastates_ckpt",
        _ENGINE,
        "the DataStates checkpoint library",
        "remove it: checkpoints are written without it",
    ),
)

_MASTERS = "16-bit master weights, which lose every update smaller than their last place"
_INSTEAD = "remove it; to save memory, set data_types.grad_accum_dtype or bf16.bf16_optimizer_states"

REMOVED: tuple[Row, ...] = (
    gone("fp16.fp16_master_weights_and_grads", "ds-zero", _MASTERS, _INSTEAD),
    gone("bf16.bf16_master_weights_and_grads", "ds-zero", _MASTERS, _INSTEAD),
    gone("amp", _ENGINE, "NVIDIA Apex", 'use "bf16": {"enabled": true}'),
    gone("nebula", _ENGINE, "Azure's checkpoint service", "remove it: save_checkpoint() is safe without it"),
    gone("quantize_training", _LAYERS, "mixture of quantisation (MoQ)", "remove it"),
    gone("eigenvalue", _LAYERS, "eigenvalues for mixture of quantisation (MoQ)", "remove it"),
    gone("graph_harvesting", "ds-zero", "the replay of CUDA graphs", "remove it, and use torch.compile"),
    gone(
        "compile",
        _ENGINE,
        "DeepCompile",
        "set it to false, and compile the model with torch.compile",
        switches={"compile.deepcompile": (False,)},
    ),
)

ROWS: tuple[Row, ...] = WORKING + EFFECTLESS + NOT_YET + REMOVED
