"""The rules of pipeline models, a part of the table `ds_engine.rules.RULES`."""

from __future__ import annotations

from ds_engine.job.choices import Choices
from ds_engine.rule import Rule

_ONE_BIT = frozenset({"onebitadam", "zerooneadam", "onebitlamb", "shardedonebitadam", "shardedonebitlamb"})


def _piped(choices: Choices) -> bool:
    """Whether the model is a pipeline."""
    return choices.pipeline is not None


def _changes_forward(choices: Choices) -> bool:
    """Whether a curriculum gives the forward more arguments."""
    settings, routing = choices.settings, choices.settings.data_efficiency.data_routing
    dropping = settings.data_efficiency.enabled and routing.enabled and routing.random_ltd.enabled
    return settings.progressive_layer_drop.enabled or settings.curriculum_learning.enabled or dropping


def _packs_samples(choices: Choices) -> bool:
    """Whether the number of samples of a step varies."""
    data = choices.settings.data_efficiency
    return data.enabled and data.data_sampling.enabled and data.data_sampling.dynamic_batching.enabled


def _name(choices: Choices) -> str:
    """Returns the name of the optimizer in lower case; empty if there is none."""
    return choices.optimizer.name.lower() if choices.optimizer is not None else ""


PIPELINE: tuple[Rule, ...] = (
    Rule(
        first="pipeline.stages",
        second="a model that is not a PipelineModule",
        applies=lambda c: not _piped(c) and c.settings.pipeline.stages not in ("auto", 1),
        reason="only a list of layers can be divided into stages",
        remedy="pass ds_pipe.model.PipelineModule(layers, num_stages) (ds_pipe.model.split makes the layers of a "
        "Hugging Face decoder), or remove the section pipeline",
    ),
    Rule(
        first="pipeline.stages",
        second="a PipelineModule with another number of stages",
        applies=lambda c: (
            c.pipeline is not None and c.settings.pipeline.stages not in ("auto", c.pipeline.num_stages)
        ),
        reason="the model has divided its layers already",
        remedy='set it to "auto", or pass the same number to PipelineModule(num_stages=...)',
    ),
    Rule(
        first="managed_gradient_accumulation false",
        second="a PipelineModule",
        applies=lambda c: _piped(c) and not c.settings.managed_gradient_accumulation,
        reason="a schedule runs a known number of micro-batches, and train_batch() ends with the update",
        remedy="remove managed_gradient_accumulation, and set gradient_accumulation_steps",
    ),
    Rule(
        first="zero_optimization.rank_invariant",
        second="a PipelineModule",
        applies=lambda c: _piped(c) and c.settings.zero_optimization.rank_invariant,
        reason="micro-batches are added on each rank in the order of the schedule, and not in one order for all ranks",
        remedy="set it to false",
    ),
    Rule(
        first="zero_optimization.mics_shard_size",
        second="a PipelineModule",
        applies=lambda c: _piped(c) and c.settings.zero_optimization.mics_shard_size > 0,
        reason="the topology of the model defines all groups of ranks",
        remedy="remove it",
    ),
    Rule(
        first="sequence_parallel_size",
        second="a PipelineModule",
        applies=lambda c: _piped(c) and (c.settings.sequence_parallel_size or 1) > 1,
        reason="stages hand on whole sequences",
        remedy="remove it",
    ),
    Rule(
        first="tensor_parallel.sequence_parallel_norms",
        second="a PipelineModule",
        applies=lambda c: _piped(c) and c.settings.tensor_parallel.sequence_parallel_norms,
        reason="stages hand on whole sequences",
        remedy="set it to false",
    ),
    Rule(
        first="offload.budget",
        second="a PipelineModule",
        applies=lambda c: _piped(c) and c.settings.offload.budget is not None,
        reason="a budget is divided by one plan for all ranks, but every stage has other tensors",
        remedy="set offload_optimizer.device instead",
    ),
    Rule(
        first="offload_optimizer.overlap_step",
        second="a PipelineModule",
        applies=lambda c: _piped(c) and c.settings.zero_optimization.overlaps_step,
        reason="a step that runs during the backward has to know the norm of all stages",
        remedy="set it to false",
    ),
    Rule(
        first="activation_offload.device",
        second="a PipelineModule",
        applies=lambda c: _piped(c) and c.settings.moves_activations,
        reason="activations are fetched in the reverse order of their micro-batches, and a schedule has another order",
        remedy="set it to none; PipelineModule(activation_checkpoint_interval=1) keeps fewer activations",
    ),
    Rule(
        first="flops_profiler.enabled",
        second="a PipelineModule",
        applies=lambda c: _piped(c) and c.settings.flops_profiler.enabled,
        reason="forwards and backwards of several micro-batches alternate, and it attributes time to one forward",
        remedy="set it to false, and draw the measured schedule (Pipeline.gathered_spans and ds_pipe.draw)",
    ),
    Rule(
        first="progressive_layer_drop, curriculum_learning or random_ltd",
        second="a PipelineModule",
        applies=lambda c: _piped(c) and _changes_forward(c),
        reason="they pass arguments to the forward of the model, and a stage gets only the value of the stage before",
        remedy="disable them, and shorten sequences in the data",
    ),
    Rule(
        first="data_efficiency.data_sampling.dynamic_batching",
        second="a PipelineModule",
        applies=lambda c: _piped(c) and _packs_samples(c),
        reason="ranks without the first or the last stage read no data, so they do not know the size of a batch",
        remedy="disable it",
    ),
    Rule(
        first="optimizer OneBitAdam, ZeroOneAdam or OneBitLamb",
        second="weights that are tied over several pipeline ranks",
        applies=lambda c: c.pipeline is not None and c.pipeline.ties and _name(c) in _ONE_BIT,
        reason="it averages over the replicas of one stage, and gradients of tied weights have to be added over stages",
        remedy='use PipelineModule(schedule="zb-v"), which has the first and the last stage on one rank, or AdamW',
    ),
    Rule(
        first="zero_optimization.zero_hpz_partition_size",
        second="weights that are tied over several pipeline ranks",
        applies=lambda c: (
            c.pipeline is not None
            and c.pipeline.ties
            and c.stage == 3
            and c.settings.zero_optimization.zero_hpz_partition_size > 1
        ),
        reason="tied weights are sharded over the ranks of several stages, which secondary copies do not know",
        remedy='set it to 1, or use PipelineModule(schedule="zb-v"), whose first and last stage are on one rank',
    ),
    Rule(
        first='zero_optimization.accumulation_plan "sharded"',
        second="a PipelineModule",
        applies=lambda c: _piped(c) and c.settings.zero_optimization.accumulation_plan == "sharded",
        reason="gradients of all micro-batches are added on each rank, and reduced once, with the last backward",
        remedy="remove it",
        refuse=False,
    ),
)
