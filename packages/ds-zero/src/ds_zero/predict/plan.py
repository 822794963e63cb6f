"""`plan`: predicts the memory and the messages of a training job."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_zero import _registry
from ds_zero.checks import check_stage
from ds_zero.config import ZeroConfig
from ds_zero.interfaces import (
    ChoosesTiers,
    CollectiveSet,
    PlansActivations,
    PlansStates,
    SegmentStep,
    UndoableStep,
)
from ds_zero.layout.optimizer_layout import undivided_groups
from ds_zero.predict import allocation_tracker
from ds_zero.predict.remedies import batch_size, nearest_that_fit
from ds_zero.predict.report import PhaseMemory, Plan, within
from ds_zero.predict.simulate import (
    FORWARD,
    Job,
    MakeOptimizer,
    Outcome,
    RanksFor,
    optimizer_states,
    simulate,
)
from ds_zero.predict.static_memory import Resting, resting_bytes
from ds_zero.predict.tiers import STATE

OFFLOADED = ("master", "grad")
"""Kinds of shards that ds_offload's HostStore keeps on the host."""


def plan(
    model: nn.Module | Callable[[], nn.Module],
    micro_batch: Any = None,
    *,
    stage: int = 2,
    ranks: int = 1,
    precision: torch.dtype | None = None,
    optimizer: Optimizer | MakeOptimizer | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    accumulation_steps: int = 1,
    config: ZeroConfig | None = None,
    offload: bool | Collection[str] = False,
    disk: bool | Collection[str] = False,
    tiers: ChoosesTiers | None = None,
    activations: PlansActivations | None = None,
    checkpointing: bool = False,
    clip: bool = True,
    shard_ranks: int | None = None,
    ranks_for: RanksFor | None = None,
    loss_scale: bool = False,
    deferred: bool | None = None,
    device: torch.device | str | None = None,
    budget_bytes: int | None = None,
    host_budget_bytes: int | None = None,
    comm: CollectiveSet | None = None,
) -> Plan:
    """Predicts the bytes that one rank holds in each phase of training, and the bytes that it sends in a step.

    Pure: it starts no process, changes nothing, and allocates no memory for values. The model may be on the meta
    device, and larger than any memory. See [Note: plan by simulation] in `predict/simulate.py`.

    Args:
        model: the unsharded model, or a function that makes it, which is called on the meta device.
        micro_batch: arguments of one forward on one rank: a tensor, a tuple of arguments, or a mapping of keywords.
            Only shapes and dtypes matter. None: plans only the states between steps, in milliseconds.
        stage, config: as for `shard`.
        ranks: number of data-parallel ranks.
        precision: compute dtype of parameters; overrides `config.param_dtype`.
        optimizer: an optimizer over the model's parameters, or a function from parameters to an optimizer. Default:
            AdamW.
        loss: a function from the model's output to a scalar. Default: the output itself, its `loss`, or its first
            element.
        accumulation_steps: number of micro-batches per optimizer step.
        offload: True keeps masters and gradients in host memory; or the kinds of shards to keep there ("param",
            "master", "grad").
        disk: True keeps masters, gradients and optimizer states on a disk; or the kinds to keep there ("param",
            "master", "grad", "state").
        tiers: decides where each tensor is kept, instead of `offload` and `disk`, like that of the store, such as
            `ds_offload.TiersByKind`.
        activations: moves activations between forward and backward, such as `ds_offload.PlannedActivationOffload`.
            None: they stay on the device.
        checkpointing: recompute the activations of every block in backward, as `torch.utils.checkpoint` does. A model
            that recomputes by itself needs no argument.
        clip: whether gradients are clipped, or their norm is computed.
        shard_ranks: number of ranks among which the model is sharded; other groups are replicas (a mesh with the axes
            replicate and shard). None: all.
        ranks_for: a function from a parameter's name and the parameter to the number of ranks among which it is
            sharded, for experts (`mesh_for` of `shard`); None: as the model. The model must contain only the experts
            of one rank.
        loss_scale: whether a `LossScaler` is used (fp16).
        deferred: whether the model is constructed under `deferred_init`, which affects only the phase "load".
            Default: whether it is on the meta device.
        device: type of the training device. Default: the accelerator if there is one, else "cpu".
        budget_bytes: device memory of one rank. If it is too small, `Plan.remedies` contains settings that fit.
        host_budget_bytes: the same for host memory.
        comm: the argument `comm` of `shard`. Collectives that send other bytes than their tensors have (`CountsBytes`)
            are counted by these; they are not called.

    Raises:
        ValueError: the model cannot be planned. The message contains a remedy.
    """
    _check(stage, ranks, accumulation_steps)
    built = _build(model)
    config = _in_precision(config or ZeroConfig(), precision)
    optimizer = optimizer or torch.optim.AdamW
    job = Job(
        stage=stage,
        num_ranks=ranks,
        config=config,
        optimizer=optimizer,
        micro_batch=micro_batch,
        loss=loss or default_loss,
        accumulation_steps=accumulation_steps,
        device=_device(device),
        offload=frozenset(OFFLOADED if offload is True else offload or ()),
        disk=frozenset((*OFFLOADED, "state") if disk is True else disk or ()),
        tiers=tiers,
        activations=activations,
        checkpointing=checkpointing,
        clip=clip,
        shard_ranks=shard_ranks,
        ranks_for=ranks_for,
        scaled=loss_scale,
        deferred=all(p.is_meta for p in built.parameters()) if deferred is None else deferred,
        states=optimizer_states(built, optimizer),
        undoable=isinstance(_made(built, optimizer), UndoableStep),
        pageable=_is_pageable(built, optimizer),
        comm=comm,
    )
    job = _with_kinds(job, built)
    planner = _Planner(built, budget_bytes, host_budget_bytes)
    planned = planner.plan(job)
    if planned.fits is False:
        planned = replace(planned, remedies=nearest_that_fit(job, planner.plan, planner.could_fit))
    return planned


@dataclass(frozen=True)
class _Planner:
    """Plans variants of a job for one model and one pair of budgets."""

    model: nn.Module
    budget_bytes: int | None
    host_budget_bytes: int | None
    activations: dict[tuple[bool, int], int] = field(default_factory=dict)
    """Of the jobs that were run, by checkpointing and size of the micro-batch: stages, ranks and offload leave them
    as they are."""

    def at_least(self, job: Job) -> tuple[int, int]:
        """Returns a lower bound of device and host bytes: the states between steps, and activations if they are
        known.
        """
        device, host = _sums(resting_bytes(self.model, job), job)
        return device + self.activations.get(_activity(job), 0), host

    def could_fit(self, job: Job) -> bool:
        """Whether states and known activations are within the budgets."""
        device, host = self.at_least(job)
        return within(device, self.budget_bytes) and within(host, self.host_budget_bytes)

    def plan(self, job: Job) -> Plan:
        """Runs the job without memory, or adds up its states if there is no micro-batch."""
        states_only = job.micro_batch is None
        rest = resting_bytes(self.model, job)
        outcome = None if states_only else simulate(self.model, job)
        reserve = 0 if outcome is None else _reserve(outcome, job.device)
        if outcome is not None:
            peak = outcome.phases[FORWARD].both if job.on_cpu else outcome.phases[FORWARD].device
            self.activations[_activity(job)] = peak.parts[allocation_tracker.ACTIVATIONS]
        given = (
            job.optimizer if isinstance(job.optimizer, Optimizer) else job.optimizer(_trainable(self.model))
        )
        params = dict(self.model.named_parameters())
        dtypes = sorted(
            {str(job.config.param_dtype or p.dtype) for p in params.values() if p.is_floating_point()}
        )
        local = job.config.accumulation == "local" if job.config.accumulation else job.stage < 2
        return Plan(
            model=type(self.model).__name__,
            params_numel=sum(p.numel() for p in params.values()),
            trainable_numel=sum(p.numel() for g in given.param_groups for p in g["params"]),
            stage=job.stage,
            ranks=job.num_ranks,
            compute_dtype=", ".join(dtypes),
            optimizer=type(given).__name__,
            accumulation_steps=job.accumulation_steps,
            accumulation_plan="local" if local else "sharded",
            checkpointing=job.checkpointing,
            offload=tuple(sorted(job.offload)),
            disk=tuple(sorted(job.disk)),
            disk_bytes=rest.disk_bytes + (0 if outcome is None else outcome.activations_disk_bytes),
            moved_bytes=0 if outcome is None else outcome.moved_bytes,
            tensors=rest.tensors,
            device=job.device.type,
            phases=(self._rest(job),) if outcome is None else _phases(outcome, job.device, reserve),
            sent_bytes={} if outcome is None else outcome.sent_bytes,
            reserve_bytes=reserve,
            notes=() if outcome is None else outcome.guesses,
            budget_bytes=self.budget_bytes,
            host_budget_bytes=self.host_budget_bytes,
        )

    def _rest(self, job: Job) -> PhaseMemory:
        rest = resting_bytes(self.model, job)
        device, host = _sums(rest, job)
        together = job.on_cpu
        parts = {
            p: rest.device.get(p, 0) + (rest.host.get(p, 0) if together else 0)
            for p in allocation_tracker.PURPOSES
        }
        return PhaseMemory(phase="rest", device_bytes=device, host_bytes=host, parts=parts)


def _activity(job: Job) -> tuple[bool, int]:
    return job.checkpointing, batch_size(job.micro_batch)


def _sums(rest: Resting, job: Job) -> tuple[int, int]:
    """Returns device and host bytes; on a CPU the first includes everything."""
    host, device = sum(rest.host.values()), sum(rest.device.values())
    return (device + host, host) if job.on_cpu else (device, host)


def _phases(outcome: Outcome, device: torch.device, reserve: int) -> tuple[PhaseMemory, ...]:
    phases = []
    for name, peaks in outcome.phases.items():
        peak = peaks.both if device.type == "cpu" else peaks.device
        phases.append(
            PhaseMemory(
                phase=name,
                device_bytes=peak.num_bytes + reserve,
                host_bytes=peaks.host.num_bytes,
                parts=dict(peak.parts),
            )
        )
    return tuple(phases)


def _reserve(outcome: Outcome, device: torch.device) -> int:
    """Returns an allowance for memory that kernels allocate while they run: packed operands, sums of threads, or
    workspaces of the matrix library of an accelerator.
    """
    largest = max(p.both.num_bytes for p in outcome.phases.values())
    return largest // 100 + (64 << 10 if device.type == "cpu" else 40 << 20)


def _with_kinds(job: Job, model: nn.Module) -> Job:
    """Returns the job with the names of the kinds that its tiers keep on the host and on a disk."""
    if job.tiers is None:
        return job
    kinds = resting_bytes(model, job).kinds
    return replace(job, offload=kinds["host"] - {STATE}, disk=kinds["disk"])


def _build(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    if isinstance(model, nn.Module):
        if _registry.find(model) is not None:
            raise ValueError(
                "this model is sharded already: plan before ds_zero.shard; ds_zero.memory counts after it"
            )
        return model
    try:
        with torch.device("meta"):
            return model()
    except (NotImplementedError, RuntimeError):
        return model()  # it reads values while it is constructed


def _check(stage: int, ranks: int, accumulation_steps: int) -> None:
    check_stage(stage)
    if ranks < 1 or accumulation_steps < 1:
        raise ValueError(f"ranks={ranks}, accumulation_steps={accumulation_steps}: both must be at least 1")


def _in_precision(config: ZeroConfig, precision: torch.dtype | None) -> ZeroConfig:
    return config if precision is None else replace(config, param_dtype=precision)


def _made(model: nn.Module, optimizer: Optimizer | MakeOptimizer) -> Optimizer:
    return optimizer if isinstance(optimizer, Optimizer) else optimizer(_trainable(model))


def _is_pageable(model: nn.Module, optimizer: Optimizer | MakeOptimizer) -> bool:
    given = _made(model, optimizer)
    try:
        return not isinstance(given, (SegmentStep, PlansStates)) and not any(undivided_groups(given, None, 1))
    except ValueError:  # it does not work on shards
        return False


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _device(device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def default_loss(output: Any) -> Tensor:
    """Returns the output if it is a scalar, its `loss`, or the loss of its first element; else the mean of the
    tensor.
    """
    if isinstance(output, Tensor):
        return output if output.ndim == 0 else output.mean()
    if isinstance(output, Mapping) and "loss" in output:
        return default_loss(output["loss"])
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return default_loss(loss)
    if isinstance(output, (tuple, list)) and output:
        return default_loss(output[0])
    raise ValueError(
        f"the model returns {type(output).__name__}: pass loss=, a function from the output to a scalar tensor"
    )
