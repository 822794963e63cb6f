"""The section `zero_optimization`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ds_engine.config.sections.zero.leaf_module import LeafModuleConfig
from ds_engine.config.sections.zero.offload import OffloadOptimizerConfig, OffloadParamConfig
from ds_engine.config.sections.zero.zenflow import ZenFlowConfig
from ds_engine.config.support.section import Count, Positive, Section, Share, Whole

STAGES = {
    0: "nothing is divided",
    1: "optimizer states are divided among ranks",
    2: "optimizer states and gradients are divided",
    3: "optimizer states, gradients and parameters are divided",
}


def _known_stage(stage: object) -> object:
    """Say what the stages are where the number is none of them; a value of another type is left to its check."""
    if isinstance(stage, int) and not isinstance(stage, bool) and stage not in STAGES:
        meaning = "; ".join(f"{number}: {text}" for number, text in STAGES.items())
        raise ValueError(f"there are stages 0 to 3 ({meaning})")
    return stage


class LoCoConfig(Section):
    """Error feedback for quantised gradients."""

    err_beta: Share = Field(default=0.8, description="Decay of the error that is fed back.")
    reset_T: Positive = Field(default=1024, description="Steps between two resets of the error.")


class ZeroOptimizationConfig(Section):
    """How the model is divided among data-parallel ranks."""

    stage: Annotated[Count, BeforeValidator(_known_stage), Field(le=3)] = Field(
        default=0, description="; ".join(f"{number}: {text}" for number, text in STAGES.items()) + "."
    )
    offload_optimizer: OffloadOptimizerConfig = Field(
        default_factory=OffloadOptimizerConfig, description="Optimizer states and step on the host."
    )
    offload_param: OffloadParamConfig = Field(
        default_factory=OffloadParamConfig, description="Parameters in host memory or on a disk; stage 3."
    )
    reduce_bucket_size: Positive | None = Field(
        default=None,
        description="Elements that one gradient message holds at most. Default: an eighth of the model, "
        "between 2^18 and 2^25.",
    )
    allgather_bucket_size: Positive | None = Field(
        default=None,
        description="Stages 1 and 2: elements that one message with new parameters holds at most. Default: as the "
        "gradient buckets.",
    )
    overlap_comm: bool | None = Field(
        default=None,
        description="Reduce gradients while backward computes. Default: where it pays.",
    )
    reduce_scatter: bool = Field(
        default=True,
        description="Each rank receives the sum of its own part only; false: all-reduce, then each takes its part.",
    )
    contiguous_gradients: bool = Field(
        default=True, description="Copy gradients into one buffer as they come."
    )
    use_multi_rank_bucket_allreduce: bool = Field(
        default=True, description="One message for the parts of several ranks."
    )
    allgather_partitions: bool = Field(
        default=True, description="Publish new parameters by all-gather, not by broadcasts."
    )
    round_robin_gradients: bool = Field(
        default=False, description="Reorder gradients so that copies to the host run in parallel."
    )
    ignore_unused_parameters: bool = Field(
        default=True,
        description="Parameters without a gradient count as zeros; false: they are an error that names them.",
    )
    compute_grad_norm: bool = Field(default=True, description="Measure the gradient's norm at every step.")
    parameter_alignment: bool = Field(
        default=False, description="Start every parameter at a multiple of 16 bytes."
    )
    sub_group_size: Count = Field(
        default=1_000_000_000, description="Elements that are stepped at once when states rest on a disk."
    )
    stage3_param_persistence_threshold: Count | None = Field(
        default=None,
        description="Stage 3: parameters of at most so many elements stay whole on every rank. Default: up "
        "to 1e5, as long as those "
        "are within 2% of the model.",
    )
    stage3_model_persistence_threshold: Count | None = Field(
        default=None,
        description="Stage 3: elements that stay whole on every rank, at most. Default: no limit.",
    )
    stage3_prefetch: bool = Field(
        default=True,
        description="Stage 3: gather the parameters of the next module while the present one computes.",
    )
    stage3_prefetch_bucket_size: Count | None = Field(
        default=None,
        description="Stage 3: elements that are gathered ahead at most. Default: the next module.",
    )
    stage3_max_live_parameters: Count | None = Field(
        default=None, description="Stage 3: gathered elements that are held at the same time, at most."
    )
    stage3_max_reuse_distance: Count | None = Field(
        default=None,
        description="Stage 3: keep a parameter that is used again within so many elements.",
    )
    stage3_module_granularity_threshold: Count = Field(
        default=0,
        description="Stage 3: gather a module whole when it has fewer elements for each of its inner modules.",
    )
    stage3_gather_16bit_weights_on_model_save: bool = Field(
        default=False, description="Stage 3: save_16bit_model() may gather the whole model on rank 0."
    )
    stage3_use_all_reduce_for_fetch_params: bool = Field(
        default=False, description="Stage 3: gather by all-reduce."
    )
    stage3_allgather_sequential: bool = Field(
        default=False, description="Stage 3: gather one parameter after the other, without a bucket."
    )
    leaf_module: LeafModuleConfig = Field(
        default_factory=LeafModuleConfig, description="Modules that stage 3 gathers whole."
    )
    zero_hpz_partition_size: Count = Field(
        default=1, description="Ranks (of one node) that share a second copy of the parameters; stage 3."
    )
    zero_quantized_weights: bool = Field(default=False, description="Gather parameters as int8.")
    zero_quantized_nontrainable_weights: bool = Field(
        default=False, description="Keep frozen parameters as int8."
    )
    zero_quantized_gradients: bool = Field(default=False, description="Reduce gradients as int4.")
    zeropp_loco_param: LoCoConfig | None = Field(
        default=None, description="Error feedback for zero_quantized_gradients."
    )
    mics_shard_size: Annotated[Whole, Field(ge=-1)] = Field(
        default=-1, description="Ranks that share one copy of the model; the groups hold replicas. -1: all."
    )
    mics_hierarchical_params_gather: bool = Field(
        default=False, description="Gather inside a node first, then between nodes."
    )
    zenflow: ZenFlowConfig | None = Field(default=None, description="Asynchronous host steps.")
    load_from_fp32_weights: bool = Field(
        default=True, description="Take fp32 masters from a checkpoint, not from its 16-bit copies."
    )
    elastic_checkpoint: bool = Field(default=False, description="Checkpoints for another number of ranks.")
    pipeline_loading_checkpoint: bool = Field(default=False, description="Load one rank after the other.")
    memory_efficient_linear: bool = Field(
        default=True, description="Linear layers that save no gathered weights."
    )
    override_module_apply: bool = Field(
        default=True, description="Module.apply() sees whole parameters while a model is constructed."
    )
    log_trace_cache_warnings: bool = Field(
        default=False, description="Say when the order of modules has changed."
    )
    enable_sanity_checks: bool = Field(default=False, description="Check internal states while running.")
    legacy_stage1: bool = Field(default=False, description="DeepSpeed's first implementation of stage 1.")
    save_muon_momentum_buffer_in_memory: bool = Field(
        default=False, description="Keep Muon's momentum in memory when states rest on a disk."
    )
    overlap_publish: bool = Field(
        default=False,
        description="Stages 1 and 2: let step() return while new parameters are still being gathered; "
        "modules wait for them. "
        "Only for code that reads parameters inside modules alone.",
    )
    accumulation_plan: Literal["local", "sharded"] | None = Field(
        default=None,
        description='How the gradients of several micro-batches are summed. "local": whole gradients on each '
        "rank, reduced once at the "
        'boundary. "sharded": reduced every micro-batch, shards are summed. Default: local in stages 0 and '
        "1, sharded in 2 and 3.",
    )
    rank_invariant: bool = Field(
        default=False,
        description="The same micro-batches give the same bits on 1, 2, 4, 8, ... ranks, with a power of two of "
        "them: sharded plan, ordered reduction, one tree of sums.",
    )
