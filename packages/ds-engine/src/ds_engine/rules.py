"""Incompatible settings: one row for each pair, with the reason. Every row has a test in tests/engine/test_rules.py.

A new incompatible pair is added here, never as an `if` in the engine.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from ds_engine import schedules
from ds_engine.build import optimizer as optimizer_section
from ds_engine.config.load import auto, loader, source
from ds_engine.config.sections.model import DsConfig
from ds_engine.config.support.errors import ConfigError
from ds_engine.job.choices import Choices
from ds_engine.pipeline_rules import PIPELINE
from ds_engine.rule import Rule


def _named(choices: Choices) -> str:
    """Returns the name of the optimizer in lower case; empty if there is none."""
    return choices.optimizer.name.lower() if choices.optimizer is not None else ""


def _passed(choices: Choices) -> bool:
    return choices.optimizer is not None and choices.optimizer.passed


def _passed_for_device(choices: Choices) -> bool:
    """Whether the passed optimizer was not made for host memory."""
    return choices.optimizer is not None and choices.optimizer.passed and not choices.optimizer.steps_on_host


def _schedule_passed(choices: Choices) -> bool:
    return choices.schedule is not None and choices.schedule.passed


def _offloads(choices: Choices) -> bool:
    return choices.settings.zero_optimization.offload_optimizer.device != "none"


def _overlaps(choices: Choices) -> bool:
    return choices.settings.zero_optimization.overlaps_step


def _offloads_params(choices: Choices) -> bool:
    return choices.settings.zero_optimization.offload_param.device != "none"


def _says(choices: Choices, key: str) -> bool:
    """Whether optimizer.params has this key."""
    own = choices.optimizer
    return own is not None and not own.passed and key in own.params


def _on_device(choices: Choices) -> bool:
    return choices.optimizer is not None and not choices.optimizer.on_host


def _has_budget(choices: Choices) -> bool:
    return choices.settings.offload.budget is not None


def _steps_a_part_on_device(choices: Choices) -> bool:
    return choices.device_type != "cpu" and (_has_budget(choices) or choices.placement.ratio < 1.0)


def _may_use_disk(choices: Choices) -> bool:
    budget = choices.settings.offload.budget
    return budget is not None and budget.nvme_path is not None


_FACTORED = frozenset({"adafactor"})
_WHOLE = frozenset({"adafactor", "lamb", "muon"})
_SELF_REDUCING = frozenset(
    {"onebitadam", "zerooneadam", "onebitlamb", "shardedonebitadam", "shardedonebitlamb"}
)

RULES: tuple[Rule, ...] = (
    Rule(
        first="bf16.bf16_optimizer_states",
        second="an optimizer object that was passed in",
        applies=lambda c: c.settings.bf16.enabled and c.settings.bf16.bf16_optimizer_states and _passed(c),
        reason="the object creates its own states",
        remedy="name the optimizer in the config, or give the object state_dtype=torch.bfloat16 and remove it",
    ),
    Rule(
        first="optimizer.params.state_dtype",
        second="an optimizer on the training device",
        applies=lambda c: _says(c, "state_dtype") and _on_device(c),
        reason="only the optimizers of ds-offload, which step in host memory, have these formats",
        remedy='set zero_optimization.offload_optimizer.device to "cpu" or "nvme", or remove it',
    ),
    Rule(
        first="optimizer.params.split_masters",
        second="an optimizer on the training device",
        applies=lambda c: _says(c, "split_masters") and _on_device(c),
        reason="only the optimizers of ds-offload, which step in host memory, keep masters in two halves",
        remedy='set zero_optimization.offload_optimizer.device to "cpu" or "nvme", or remove it',
    ),
    Rule(
        first="optimizer.params.split_masters",
        second="training without bf16",
        applies=lambda c: _says(c, "split_masters") and not _on_device(c) and not c.settings.bf16.enabled,
        reason="a master is split into a bf16 parameter and 16 more bits",
        remedy="set bf16.enabled to true, or remove it",
    ),
    Rule(
        first="optimizer.params.state_dtype",
        second="bf16.bf16_optimizer_states",
        applies=lambda c: (
            _says(c, "state_dtype")
            and not _on_device(c)
            and c.settings.bf16.enabled
            and c.settings.bf16.bf16_optimizer_states
        ),
        reason="both name the dtype of the same states",
        remedy="remove one of them",
    ),
    Rule(
        first="optimizer LBFGS",
        second="engine.step()",
        applies=lambda c: _named(c) == "lbfgs",
        reason="its step evaluates the model again through a closure",
        remedy="use an optimizer without a closure, for example AdamW",
    ),
    Rule(
        first="optimizer SparseAdam",
        second="dense gradient buckets",
        applies=lambda c: _named(c) == "sparseadam",
        reason="it accepts only sparse gradients, but gradients are reduced in dense buckets",
        remedy="use AdamW, and sparse=False in nn.Embedding",
    ),
    Rule(
        first="offload_optimizer.device",
        second="an optimizer object that was passed in",
        applies=lambda c: _offloads(c) and _passed_for_device(c) and c.settings.zero_force_ds_cpu_optimizer,
        reason="masters and states are in host memory, where an optimizer that was not made for it is slow",
        remedy="pass a ds_offload.CPUAdam, name the optimizer in the config instead, or set "
        "zero_force_ds_cpu_optimizer to false",
    ),
    Rule(
        first="offload_optimizer.device nvme",
        second="an optimizer with factored states",
        applies=lambda c: c.placement.optimizer_states == "nvme" and _named(c) in _FACTORED,
        reason="its states are read from the disk in pages, which contain states of each element",
        remedy='use AdamW, Muon, Lamb, Adagrad, Lion or SGD, or set offload_optimizer.device to "cpu"',
    ),
    Rule(
        first="optimizer.params.state_dtype",
        second="offload_optimizer.ratio below 1, or offload.budget",
        applies=lambda c: _says(c, "state_dtype") and _steps_a_part_on_device(c),
        reason="a part is stepped on the device, whose kernels do not have these formats",
        remedy="remove it, or set ratio to 1 and remove the budget",
    ),
    Rule(
        first="offload.budget",
        second="offload_optimizer.device or offload_param.device",
        applies=lambda c: _has_budget(c) and (_offloads(c) or _offloads_params(c)),
        reason="a budget decides about each tensor, and the others about each kind",
        remedy="remove the sections offload_optimizer and offload_param, or the budget",
    ),
    Rule(
        first="offload.budget",
        second="stage 0",
        applies=lambda c: _has_budget(c) and c.stage == 0,
        reason="at stage 0 every rank steps all elements, on its device",
        remedy="set zero_optimization.stage to 1, 2 or 3",
    ),
    Rule(
        first="offload.budget with nvme_path",
        second="an optimizer with factored states",
        applies=lambda c: _may_use_disk(c) and _named(c) in _FACTORED,
        reason="its states are read from the disk in pages, which contain states of each element",
        remedy="use AdamW, Muon, Lamb, Adagrad, Lion or SGD, or remove nvme_path from the budget",
    ),
    Rule(
        first="integrity.checksums",
        second="offload.budget with nvme_path",
        applies=lambda c: c.settings.integrity.checksums and _may_use_disk(c),
        reason="checksums of shards are computed from values in memory; those on a disk are checked by aio.verify",
        remedy="set integrity.checksums to false, or remove nvme_path from the budget",
    ),
    Rule(
        first="zero_optimization.zero_quantized_weights, _gradients or _nontrainable_weights",
        second="zero_optimization.rank_invariant",
        applies=lambda c: c.quantized and c.settings.zero_optimization.rank_invariant,
        reason="what is rounded depends on the number of ranks",
        remedy="remove one of them",
    ),
    Rule(
        first="zero_optimization.zero_quantized_nontrainable_weights",
        second="integrity.checksums",
        applies=lambda c: c.quantized_frozen and c.settings.integrity.checksums,
        reason="frozen shards are stored as codes, which no checksum covers",
        remedy="set one of them to false",
    ),
    Rule(
        first="integrity.message_checksums",
        second="what compresses messages or reduces gradients by itself",
        applies=lambda c: (
            c.settings.integrity.message_checksums
            and (
                c.quantized or c.settings.local_sgd is not None or optimizer_section.communicates(c.optimizer)
            )
        ),
        reason="checksums are compared in the exact collectives of ds-zero only",
        remedy="set integrity.message_checksums to false, or use exact collectives and an ordinary optimizer",
    ),
    Rule(
        first="local_sgd",
        second="zero_optimization.stage 1, 2 or 3",
        applies=lambda c: c.settings.local_sgd is not None and c.stage > 0,
        reason="every rank steps alone, with whole parameters and states",
        remedy="set zero_optimization.stage to 0, or remove local_sgd",
    ),
    Rule(
        first="local_sgd",
        second="an optimizer that averages gradients itself",
        applies=lambda c: c.settings.local_sgd is not None and optimizer_section.communicates(c.optimizer),
        reason="gradients would be averaged in every step",
        remedy='set optimizer.type to "AdamW", or remove local_sgd',
    ),
    Rule(
        first="offload_optimizer.device nvme",
        second="an optimizer that averages gradients itself",
        applies=lambda c: (
            c.placement.optimizer_states == "nvme" and optimizer_section.communicates(c.optimizer)
        ),
        reason="it compresses what it sends on the device of the model, where its states have to be",
        remedy='remove zero_optimization.offload_optimizer, or set optimizer.type to "AdamW"',
    ),
    Rule(
        first="integrity.checksums",
        second="offload_optimizer.device nvme",
        applies=lambda c: c.settings.integrity.checksums and c.placement.optimizer_states == "nvme",
        reason="checksums of shards are computed from values in memory; those on a disk are checked by aio.verify",
        remedy='set integrity.checksums to false, or offload_optimizer.device to "cpu"',
    ),
    Rule(
        first="offload_optimizer.overlap_step",
        second="integrity.checksums",
        applies=lambda c: _overlaps(c) and c.settings.integrity.checksums,
        reason="checksums of shards are compared in one pass over all of them, before any is updated",
        remedy="set one of them to false",
    ),
    Rule(
        first="the choice of columns of zero_optimization.zenflow",
        second="exact steps",
        applies=lambda c: c.settings.zero_optimization.zenflow is not None,
        reason="all columns are updated in every step, during the backward, and no gradient is used late",
        remedy="set offload_optimizer.overlap_step to true instead of the section",
        refuse=False,
    ),
    Rule(
        first="offload_optimizer.overlap_step",
        second="managed_gradient_accumulation false",
        applies=lambda c: _overlaps(c) and not c.settings.managed_gradient_accumulation,
        reason="no backward is known to be the last one before a step",
        remedy="remove managed_gradient_accumulation, and set gradient_accumulation_steps",
        refuse=False,
    ),
    Rule(
        first="offload_optimizer.overlap_step",
        second="parameters in fp32",
        applies=lambda c: _overlaps(c) and not (c.settings.bf16.enabled or c.settings.fp16.enabled),
        reason="the masters are the parameters, which the backward still reads",
        remedy="set bf16.enabled to true, or remove overlap_step",
        refuse=False,
    ),
    *PIPELINE,
    Rule(
        first="an optimizer object that was passed in",
        second="the section optimizer",
        applies=lambda c: _passed(c) and c.settings.optimizer is not None,
        reason="a job has one optimizer, and it is not clear which of the two to use",
        remedy="remove one of them",
    ),
    Rule(
        first="a scheduler object that was passed in",
        second="the section scheduler",
        applies=lambda c: _schedule_passed(c) and c.settings.scheduler is not None,
        reason="a job has one schedule, and it is not clear which of the two to use",
        remedy="remove one of them",
    ),
    Rule(
        first="tensor_parallel",
        second="an optimizer that needs whole tensors",
        applies=lambda c: c.settings.tensor_parallel.ranks > 1 and _named(c) in _WHOLE,
        reason="each rank has a part of each tensor, whose norms and factors are others than those of the whole",
        remedy="use AdamW, Adagrad, Lion or SGD, or set autotp_size to 1",
    ),
    Rule(
        first="tensor_parallel",
        second="an optimizer that reduces gradients itself",
        applies=lambda c: c.settings.tensor_parallel.ranks > 1 and _named(c) in _SELF_REDUCING,
        reason="it exchanges gradients among all ranks, which have parts of different layers",
        remedy="use AdamW, or set autotp_size to 1",
    ),
    Rule(
        first="sparse_attention",
        second="sequence_parallel_size",
        applies=lambda c: (
            c.settings.sparse_attention is not None and (c.settings.sequence_parallel_size or 1) > 1
        ),
        reason="each sets the attention function of the model",
        remedy="remove the section, and call ds_layers.Ulysses(group, BlockSparseAttention(...)) in the model",
    ),
    Rule(
        first="zero_optimization.offload_param",
        second="a stage below 3",
        applies=lambda c: _offloads_params(c) and c.stage < 3,
        reason="below stage 3, parameters are whole on every rank and stay on the model's device",
        remedy="remove the section, or set zero_optimization.stage to 3",
        refuse=False,
    ),
    Rule(
        first="zero_optimization.offload_param.device cpu",
        second="a model on the CPU",
        applies=lambda c: _offloads_params(c) and c.placement.params == "cpu" and c.device_type == "cpu",
        reason="parameters are in host memory already",
        remedy="remove the section",
        refuse=False,
    ),
)


def load(
    config: str | os.PathLike[str] | Mapping[str, Any] | DsConfig,
    choices_for: Callable[[DsConfig], Choices],
    *,
    autos_may_stay: bool = False,
) -> DsConfig:
    """Reads a configuration, and checks it together with the arguments of `initialize`.

    Args:
        config: as for `config.load`.
        choices_for: returns the choices to check for a configuration.
        autos_may_stay: as for `check`.

    Raises:
        ConfigError: lists all mistakes in both.
    """
    if isinstance(config, DsConfig):
        check(choices_for(config), autos_may_stay=autos_may_stay)
        return config
    examined = loader.examine(source.open_source(config))
    choices = choices_for(examined.config) if examined.config is not None else None
    more = mistakes(choices, autos_may_stay=autos_may_stay) if choices is not None else []
    settings = loader.accept(examined, more)
    if choices is not None:
        _warn(choices)
    return settings


def check(choices: Choices, *, autos_may_stay: bool = False) -> None:
    """Raises for, or warns about, incompatible settings; raises for an "auto" that needs a value.

    Args:
        autos_may_stay: accept "auto", because an integration will replace it later.

    Raises:
        ConfigError: lists all mistakes.
    """
    problems = mistakes(choices, autos_may_stay=autos_may_stay)
    if problems:
        raise ConfigError(problems, choices.settings.origin.where)
    _warn(choices)


def mistakes(choices: Choices, *, autos_may_stay: bool = False) -> list[str]:
    """Yields a sentence for each mistake that `check` raises."""
    refused = [rule for rule in RULES if rule.refuse and rule.applies(choices)]
    problems = [] if autos_may_stay else list(auto.unfilled(choices.settings))
    problems += _wrong_names(choices)
    return problems + [f"{r.first} and {r.second} are incompatible: {r.reason}; {r.remedy}" for r in refused]


def _warn(choices: Choices) -> None:
    """Warns about settings that have no effect in this job, on rank 0."""
    for rule in RULES:
        if not rule.refuse and rule.applies(choices):
            warnings.warn(
                f"{rule.first} has no effect with {rule.second}: {rule.reason}; {rule.remedy}", stacklevel=4
            )


def _wrong_names(choices: Choices) -> list[str]:
    """Yields mistakes in the sections optimizer and scheduler, if these are used."""
    problems: list[str] = []
    if choices.optimizer is not None and not choices.optimizer.passed:
        problems += optimizer_section.check(choices.optimizer)
    schedule = choices.schedule
    if schedule is not None and not schedule.passed:
        # A missing value with "auto" is reported by `auto.unfilled`.
        left = {path.rpartition(".")[2] for path in choices.settings.origin.autos}
        problems += [
            problem
            for problem in schedules.check(schedule.name, schedule.params)
            if not any(problem.startswith(f"scheduler.params.{name} is missing") for name in left)
        ]
    return problems
