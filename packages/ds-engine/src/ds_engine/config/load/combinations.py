"""Settings of one file that exclude each other in every job. `ds_engine.rules` has those that depend on the job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ds_engine.config.sections.data.curriculum import CurriculumConfig
from ds_engine.config.sections.data.data_efficiency import (
    DataSamplingConfig,
    DynamicBatchingConfig,
    RandomLtdConfig,
)
from ds_engine.config.sections.model import DsConfig


@dataclass(frozen=True, kw_only=True)
class Combination:
    """A combination of settings that is an error."""

    key: str
    """Path of the key at which the error is reported."""
    broken: Callable[[DsConfig], bool]
    sentence: str


def _param_dtype(config: DsConfig) -> str:
    return "fp16" if config.fp16.enabled else "bf16" if config.bf16.enabled else "fp32"


def _sampling(config: DsConfig) -> DataSamplingConfig | None:
    """Returns the section `data_sampling` if it is enabled."""
    section = config.data_efficiency
    return section.data_sampling if section.enabled and section.data_sampling.enabled else None


def _tokens(config: DsConfig) -> DynamicBatchingConfig | None:
    sampling = _sampling(config)
    return sampling.dynamic_batching if sampling is not None and sampling.dynamic_batching.enabled else None


def _curriculum(config: DsConfig) -> CurriculumConfig | None:
    sampling = _sampling(config)
    return (
        sampling.curriculum_learning
        if sampling is not None and sampling.curriculum_learning.enabled
        else None
    )


def _dropping(config: DsConfig) -> RandomLtdConfig | None:
    section = config.data_efficiency
    ltd = section.data_routing.random_ltd
    return ltd if section.enabled and section.data_routing.enabled and ltd.enabled else None


def _grows(section: RandomLtdConfig) -> bool:
    """Whether the schedule is complete and consistent."""
    growth = section.random_ltd_schedule
    low, high, numbers = growth.min_value, growth.max_value, growth.schedule_config
    return (
        low is not None
        and high is not None
        and low <= high
        and numbers.require_steps is not None
        and numbers.seq_per_step is not None
    )


_SAMPLING = "data_efficiency.data_sampling"
_TOKENS = f"{_SAMPLING}.dynamic_batching"
_CURRICULUM = f"{_SAMPLING}.curriculum_learning"
_LTD = "data_efficiency.data_routing.random_ltd"

_DATA: tuple[Combination, ...] = (
    Combination(
        key=f"{_LTD}.random_ltd_layer_id",
        broken=lambda c: (s := _dropping(c)) is not None and not s.random_ltd_layer_id,
        sentence=f"{_LTD} needs random_ltd_layer_id, the indices (from 0) of the layers that drop tokens",
    ),
    Combination(
        key=f"{_LTD}.random_ltd_layer_num",
        broken=lambda c: (
            (s := _dropping(c)) is not None
            and s.random_ltd_layer_num is not None
            and s.random_ltd_layer_num != len(s.random_ltd_layer_id or ())
        ),
        sentence=f"{_LTD}.random_ltd_layer_num is not the number of layers in random_ltd_layer_id: remove it, or "
        "correct one of them",
    ),
    Combination(
        key=f"{_LTD}.random_ltd_schedule",
        broken=lambda c: (s := _dropping(c)) is not None and not _grows(s),
        sentence=f"{_LTD}.random_ltd_schedule needs min_value, max_value (at least min_value), "
        "schedule_config.require_steps and schedule_config.seq_per_step",
    ),
    Combination(
        key=f"{_TOKENS}.enabled",
        broken=lambda c: _tokens(c) is not None and _curriculum(c) is not None,
        sentence=f"{_TOKENS}.enabled and curriculum_learning.enabled exclude each other: both decide which samples "
        "make a batch; set one of them to false",
    ),
    Combination(
        key=f"{_SAMPLING}.enabled",
        broken=lambda c: (
            not c.managed_gradient_accumulation and (_tokens(c) is not None or _curriculum(c) is not None)
        ),
        sentence=f"{_SAMPLING} and managed_gradient_accumulation false exclude each other: data_sampling makes "
        "batches of train_batch_size; remove one of them",
    ),
    Combination(
        key=f"{_TOKENS}.max_tokens",
        broken=lambda c: (s := _tokens(c)) is not None and s.max_tokens is None,
        sentence=f"{_TOKENS} needs max_tokens, the maximum number of tokens in a pack",
    ),
    Combination(
        key=f"{_TOKENS}.metrics_path",
        broken=lambda c: (s := _tokens(c)) is not None and not s.metrics_path,
        sentence=f"{_TOKENS} needs metrics_path, a folder in which ds_engine.sampling.Analyzer has written the measure "
        '"seqlen"',
    ),
    Combination(
        key=f"{_TOKENS}.max_batch_size",
        broken=lambda c: (
            (s := _tokens(c)) is not None
            and s.max_batch_size is not None
            and s.max_batch_size < s.min_batch_size
        ),
        sentence=f"{_TOKENS}.max_batch_size is below min_batch_size: no batch can satisfy both",
    ),
    Combination(
        key=f"{_CURRICULUM}.curriculum_metrics",
        broken=lambda c: (s := _curriculum(c)) is not None and not s.curriculum_metrics,
        sentence=f"{_CURRICULUM} needs curriculum_metrics, at least one measure of difficulty",
    ),
    Combination(
        key=f"{_CURRICULUM}.curriculum_metrics",
        broken=lambda c: (
            (s := _curriculum(c)) is not None
            and any(
                m.clustering_type == "schedule_based" and not m.index_to_sample_path
                for m in s.curriculum_metrics.values()
            )
        ),
        sentence=f"{_CURRICULUM}.curriculum_metrics: a measure needs index_to_sample_path, a folder that "
        'ds_engine.sampling.Analyzer has written; or clustering_type "single_cluster", which restricts nothing',
    ),
)

COMBINATIONS: tuple[Combination, ...] = (
    Combination(
        key="fp16.enabled",
        broken=lambda c: c.fp16.enabled and c.bf16.enabled,
        sentence="fp16.enabled and bf16.enabled exclude each other: set one of them to false. Use bf16 if the "
        "hardware supports it, since it needs no loss scale",
    ),
    Combination(
        key="fp16.initial_scale_power",
        broken=lambda c: 2.0**c.fp16.initial_scale_power < c.fp16.min_loss_scale,
        sentence="fp16.initial_scale_power: 2 to this power is below fp16.min_loss_scale; raise the first or lower the "
        "second",
    ),
    Combination(
        key="sparse_gradients",
        broken=lambda c: c.sparse_gradients and c.zero_optimization.stage > 0,
        sentence="sparse_gradients needs zero_optimization.stage 0: at higher stages each rank receives only its "
        "part of every gradient, which does not consist of whole rows; set it to false, or stage to 0",
    ),
    Combination(
        key="data_types.param_dtype",
        broken=lambda c: c.data_types.param_dtype not in (None, _param_dtype(c)),
        sentence="data_types.param_dtype differs from the dtype that the sections fp16 and bf16 select: remove it, or "
        "enable the section of its name",
    ),
    Combination(
        key="gradient_allreduce_op",
        broken=lambda c: c.gradient_allreduce_op == "sum" and c.zero_optimization.stage == 3,
        sentence='gradient_allreduce_op "sum" and zero_optimization.stage 3 exclude each other: set it to "mean", '
        "and multiply the loss by the number of ranks",
    ),
    Combination(
        key="zero_optimization.zero_hpz_partition_size",
        broken=lambda c: c.zero_optimization.zero_hpz_partition_size > 1 and c.zero_optimization.stage != 3,
        sentence="zero_optimization.zero_hpz_partition_size needs stage 3, because at lower stages parameters "
        "are whole on every rank; remove it, or set stage to 3",
    ),
    Combination(
        key="zero_optimization.mics_shard_size",
        broken=lambda c: c.zero_optimization.mics_shard_size > 0 and c.zero_optimization.stage != 3,
        sentence="zero_optimization.mics_shard_size needs stage 3; remove it, or set stage to 3",
    ),
    Combination(
        key="zero_optimization.mics_shard_size",
        broken=lambda c: (
            c.zero_optimization.mics_shard_size > 0 and c.zero_optimization.zero_hpz_partition_size > 1
        ),
        sentence="zero_optimization.mics_shard_size and zero_hpz_partition_size exclude each other: a group that "
        "holds the whole model needs no second copy; remove one of them",
    ),
    Combination(
        key="zero_optimization.offload_optimizer.nvme_path",
        broken=lambda c: (
            c.zero_optimization.offload_optimizer.device == "nvme"
            and c.zero_optimization.offload_optimizer.nvme_path in (None, "", "none")
        ),
        sentence='zero_optimization.offload_optimizer.device "nvme" needs nvme_path, a directory on the disk',
    ),
    Combination(
        key="zero_optimization.offload_optimizer.buffer_count",
        broken=lambda c: (
            c.zero_optimization.offload_optimizer.device == "nvme"
            and c.zero_optimization.offload_optimizer.buffer_count < 3
        ),
        sentence='zero_optimization.offload_optimizer.device "nvme" needs a buffer_count of at least 3: one page is '
        "stepped, the next one is read, and the previous one is written",
    ),
    Combination(
        key="offload.budget.disk",
        broken=lambda c: (
            c.offload.budget is not None and bool(c.offload.budget.disk) and not c.offload.budget.nvme_path
        ),
        sentence="offload.budget.disk needs nvme_path, a directory on the disk",
    ),
    Combination(
        key="activation_offload.budget_bytes",
        broken=lambda c: (
            c.offload.budget is not None
            and c.offload.budget.activations is not None
            and c.activation_offload.budget_bytes > 0
        ),
        sentence="offload.budget.activations decides how many bytes of activations stay on the device: remove "
        "activation_offload.budget_bytes",
    ),
    Combination(
        key="activation_offload.nvme_path",
        broken=lambda c: (
            c.activation_offload.device == "nvme" and c.activation_offload.nvme_path in (None, "", "none")
        ),
        sentence='activation_offload.device "nvme" needs nvme_path, a directory on the disk',
    ),
    Combination(
        key="zero_optimization.offload_param.nvme_path",
        broken=lambda c: (
            c.zero_optimization.stage == 3
            and c.zero_optimization.offload_param.device == "nvme"
            and c.zero_optimization.offload_param.nvme_path in (None, "", "none")
        ),
        sentence='zero_optimization.offload_param.device "nvme" needs nvme_path, a directory on the disk',
    ),
    Combination(
        key="checkpoint.writer",
        broken=lambda c: (
            c.checkpoint.writer is not None
            and c.checkpoint.writer.decoupled
            and c.checkpoint.writer.type == "python"
        ),
        sentence='checkpoint.writer.decoupled and type "python" exclude each other; remove one of them',
    ),
    Combination(
        key="autotuning.end_profile_step",
        broken=lambda c: c.autotuning.end_profile_step < c.autotuning.start_profile_step,
        sentence="autotuning.end_profile_step comes before start_profile_step: no step would be measured",
    ),
    Combination(
        key="elasticity.max_gpus",
        broken=lambda c: c.elasticity.max_gpus < c.elasticity.min_gpus,
        sentence="elasticity.max_gpus is less than min_gpus: no number of ranks can satisfy both",
    ),
    Combination(
        key="optimizer.params.max_grad_norm",
        broken=lambda c: c.optimizer is not None and "max_grad_norm" in c.optimizer.params,
        sentence='optimizer.params.max_grad_norm is not supported: set "gradient_clipping" at the top level',
    ),
    *_DATA,
)
