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
    """Error feedback for quantised gradients (LoCo)."""

    err_beta: Annotated[Share, Field(lt=1.0)] = Field(
        default=0.8,
        description="Weight of earlier errors in the moving average that is fed back, from 0 to below 1; what the last "
        "message lost has the rest.",
    )
    reset_T: Positive = Field(
        default=1024, description="Number of reductions after which the errors are set to zero."
    )


class ZeroOptimizationConfig(Section):
    """ZeRO: how training state is divided among data-parallel ranks."""

    stage: Annotated[Count, BeforeValidator(_known_stage), Field(le=3)] = Field(
        default=0,
        description="ZeRO stage. " + "; ".join(f"{number}: {text}" for number, text in STAGES.items()) + ".",
    )
    offload_optimizer: OffloadOptimizerConfig = Field(
        default_factory=OffloadOptimizerConfig,
        description="Where optimizer states are kept and the optimizer runs.",
    )
    offload_param: OffloadParamConfig = Field(
        default_factory=OffloadParamConfig,
        description="Where parameters of stage 3 are kept while they are not in use.",
    )
    reduce_bucket_size: Positive | None = Field(
        default=None,
        description="Maximum number of elements in one gradient message. Default: an eighth of the model, "
        "between 2^18 and 2^25.",
    )
    allgather_bucket_size: Positive | None = Field(
        default=None,
        description="Maximum number of elements in one message with updated parameters, at stages 1 and 2. "
        "Default: the size of the gradient buckets.",
    )
    overlap_comm: bool | None = Field(
        default=None,
        description="Reduces gradients while backward computes. Default: chosen by expected speed.",
    )
    reduce_scatter: bool = Field(
        default=True,
        description="Reduces gradients by reduce-scatter, so that each rank gets only the sum of its own part. "
        "With false, by all-reduce.",
    )
    contiguous_gradients: bool = Field(
        default=True, description="Copies gradients into one buffer as they are computed."
    )
    use_multi_rank_bucket_allreduce: bool = Field(
        default=True, description="Reduces the parts of several ranks in one message."
    )
    allgather_partitions: bool = Field(
        default=True, description="Distributes updated parameters by all-gather instead of by broadcasts."
    )
    round_robin_gradients: bool = Field(
        default=False, description="Orders gradients so that copies to the host run in parallel."
    )
    ignore_unused_parameters: bool = Field(
        default=True,
        description="Treats missing gradients as zeros; false raises an error that names the parameters.",
    )
    compute_grad_norm: bool = Field(
        default=True, description="Computes the norm of the gradient in every step."
    )
    parameter_alignment: bool = Field(
        default=False, description="Aligns every parameter to 16 bytes in its buffer."
    )
    sub_group_size: Count = Field(
        default=1_000_000_000,
        description="Number of elements that are stepped at once when optimizer states are kept on a disk.",
    )
    stage3_param_persistence_threshold: Count | None = Field(
        default=None,
        description="Parameters with at most this number of elements stay whole on every rank at stage 3. "
        "Default: 1e5, or the largest smaller number with which at most 2% of the model stay whole.",
    )
    stage3_model_persistence_threshold: Count | None = Field(
        default=None,
        description="Maximum total number of elements that stay whole on every rank at stage 3. Default: no limit.",
    )
    stage3_prefetch: bool = Field(
        default=True,
        description="Gathers the parameters of the next module while the current one computes, at stage 3.",
    )
    stage3_prefetch_bucket_size: Count | None = Field(
        default=None,
        description="Maximum number of elements that are prefetched at stage 3. Default: those of the next module.",
    )
    stage3_max_live_parameters: Count | None = Field(
        default=None,
        description="Maximum number of gathered elements; above it, no further modules are prefetched or kept, "
        "at stage 3. Default: no limit.",
    )
    stage3_max_reuse_distance: Count | None = Field(
        default=None,
        description="Keeps a parameter gathered if at most this number of other elements are used before its "
        "next use, at stage 3. Default: only parameters that the next module uses again are kept.",
    )
    stage3_module_granularity_threshold: Count = Field(
        default=0,
        description="Gathers a module as a whole if its submodules have fewer elements than this on average, at "
        "stage 3; 0 turns it off.",
    )
    stage3_gather_16bit_weights_on_model_save: bool = Field(
        default=False, description="Allows save_16bit_model() to gather the whole model on rank 0 at stage 3."
    )
    stage3_use_all_reduce_for_fetch_params: bool = Field(
        default=False, description="Gathers parameters by all-reduce at stage 3."
    )
    stage3_allgather_sequential: bool = Field(
        default=False, description="Gathers one parameter after another, without a bucket, at stage 3."
    )
    leaf_module: LeafModuleConfig = Field(
        default_factory=LeafModuleConfig, description="Modules whose parameters stage 3 gathers all at once."
    )
    zero_hpz_partition_size: Count = Field(
        default=1,
        description="Number of ranks, usually those of one machine, among which a second copy of the parameters "
        "is sharded at stage 3 (hpZ); 1 keeps no second copy.",
    )
    zero_quantized_weights: bool = Field(
        default=False,
        description="Sends parameters as int8 with a scale for each block when stage 3 gathers them (qwZ): a quarter "
        "of the bytes of fp32. Masters are not rounded.",
    )
    zero_quantized_nontrainable_weights: bool = Field(
        default=False,
        description="Keeps the shards of frozen parameters as int8 with a scale for each block, and gathers them so, "
        "at stage 3: about 1 byte an element instead of 2 or 4. Small parameters that stay whole are not rounded.",
    )
    zero_quantized_gradients: bool = Field(
        default=False,
        description="Sends gradients as int4, rounded stochastically, when they are reduced (qgZ): first among the "
        "ranks of one machine (or of zero_hpz_partition_size), then between machines.",
    )
    zeropp_loco_param: LoCoConfig | None = Field(
        default=None,
        description="Feeds back what zero_quantized_gradients loses, and rounds to nearest then; it takes 4 bytes a "
        "parameter on every rank. Default: none.",
    )
    mics_shard_size: Annotated[Whole, Field(ge=-1)] = Field(
        default=-1,
        description="Number of ranks among which one replica of the model is sharded (MiCS). -1 means all ranks.",
    )
    mics_hierarchical_params_gather: bool = Field(
        default=False, description="Gathers parameters within a machine first, then between machines."
    )
    zenflow: ZenFlowConfig | None = Field(
        default=None,
        description="Asynchronous steps on the host, in DeepSpeed. Here it turns on offload_optimizer.overlap_step: "
        "all columns are updated in every step, and no gradient is used late. Default: none.",
    )
    load_from_fp32_weights: bool = Field(
        default=True,
        description="Loads fp32 master parameters from a checkpoint; false makes them from its 16-bit "
        "parameters.",
    )
    elastic_checkpoint: bool = Field(
        default=False, description="Writes checkpoints that another number of ranks can load."
    )
    pipeline_loading_checkpoint: bool = Field(
        default=False, description="Lets one rank after another load a checkpoint."
    )
    memory_efficient_linear: bool = Field(
        default=True, description="Uses linear layers that do not save gathered weights for backward."
    )
    override_module_apply: bool = Field(
        default=True, description="Gathers parameters for Module.apply() while a model is constructed."
    )
    log_trace_cache_warnings: bool = Field(
        default=False, description="Warns when the order of modules has changed."
    )
    enable_sanity_checks: bool = Field(default=False, description="Checks internal state during training.")
    legacy_stage1: bool = Field(
        default=False, description="Uses DeepSpeed's first implementation of stage 1."
    )
    save_muon_momentum_buffer_in_memory: bool = Field(
        default=False, description="Keeps Muon's momentum in memory when optimizer states are kept on a disk."
    )
    overlap_publish: bool = Field(
        default=False,
        description="Lets step() return while updated parameters are still being gathered, at stages 1 and 2; "
        "each module waits for its own. Right after a step, only code inside of modules may read "
        "parameters.",
    )
    accumulation_plan: Literal["local", "sharded"] | None = Field(
        default=None,
        description="How gradients of several micro-batches are accumulated. "
        '"local" keeps whole gradients on each rank and reduces them once per step. "sharded" reduces them in '
        "every micro-batch and adds up shards. Default: local at stages 0 and 1, sharded at stages 2 and 3.",
    )
    rank_invariant: bool = Field(
        default=False,
        description="Gives the same bits on 1, 2, 4, 8, ... ranks for the same micro-batches, if their number "
        "is a power of two. Uses the sharded plan, an ordered reduction and a fixed tree of sums.",
    )

    @property
    def overlaps_step(self) -> bool:
        """Whether parameters are updated during the backward, also if it is asked for by one of DeepSpeed's names."""
        offload = self.offload_optimizer
        return offload.overlap_step or offload.super_offload or self.zenflow is not None
