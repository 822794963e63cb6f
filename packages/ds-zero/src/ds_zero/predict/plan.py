"""`plan`: how much memory a training job will hold and how many bytes it will send, known before it starts."""

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

OFFLOADED = ("master", "grad")
"""Kinds of shards that ds_offload's HostStore takes to the host."""


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
    checkpointing: bool = False,
    clip: bool = True,
    shard_ranks: int | None = None,
    ranks_for: RanksFor | None = None,
    loss_scale: bool = False,
    deferred: bool | None = None,
    device: torch.device | str | None = None,
    budget_bytes: int | None = None,
    host_budget_bytes: int | None = None,
) -> Plan:
    """Predict the bytes that one rank holds in each phase of training, and those it sends in a step.

    Pure: nothing is started, moved or changed, and no memory for values is taken, so models on the meta device and
    models that fit nowhere are planned alike. See [Note: plan by running] in `predict/simulate.py`.

    Args:
        model: the model, unsharded, or a function that makes it (called on the meta device).
        micro_batch: arguments of one forward on one rank: a tensor, a tuple of arguments, or a mapping of keywords.
            Only shapes and dtypes count. None: the states between steps alone, in milliseconds.
        stage, config: as for `shard`.
        ranks: data-parallel ranks.
        precision: dtype in which parameters compute, over `config.param_dtype`.
        optimizer: an optimizer over the model's parameters, or a function from parameters to one; default AdamW.
        loss: from the model's output to a scalar; default the output itself, its `loss`, or its first element.
        accumulation_steps: micro-batches per optimizer step.
        offload: True for masters and gradients in host memory, or the kinds of shards that rest there.
        checkpointing: recompute the activations of every block in backward, as `torch.utils.checkpoint` does. A
            model that does so by itself needs no word.
        clip: whether gradients are clipped, or their norm is asked for.
        shard_ranks: how many of the ranks divide the model among themselves; the others hold the same (a mesh of two
            axes, replicate and shard). None: all.
        ranks_for: from a parameter's name and the parameter to the number of ranks that divide it: experts, which
            `mesh_for` gives ranks of their own; None: the model's. The model has its own experts alone.
        loss_scale: whether a `LossScaler` guards the steps (fp16).
        deferred: whether the model is constructed under `deferred_init`, which matters for loading alone; default:
            whether it is on the meta device.
        device: where the model computes; default the accelerator if there is one, else "cpu".
        budget_bytes: memory of the device for one rank; where it does not suffice, `Plan.remedies` says what would.
        host_budget_bytes: the same for host memory.

    Raises:
        ValueError: a model that cannot be planned, with what to do.
    """
    check_stage(stage)
    if ranks < 1 or accumulation_steps < 1:
        raise ValueError(f"ranks={ranks}, accumulation_steps={accumulation_steps}: give 1 or more")
    built = _build(model)
    if _registry.find(built) is not None:
        raise ValueError(
            "this model is sharded already: plan before ds_zero.shard; ds_zero.memory counts after it"
        )
    config = config or ZeroConfig()
    if precision is not None:
        config = replace(config, param_dtype=precision)
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
        checkpointing=checkpointing,
        clip=clip,
        shard_ranks=shard_ranks,
        ranks_for=ranks_for,
        scaled=loss_scale,
        deferred=all(p.is_meta for p in built.parameters()) if deferred is None else deferred,
        states=optimizer_states(built, optimizer),
    )
    planner = _Planner(built, budget_bytes, host_budget_bytes)
    planned = planner.plan(job)
    if planned.fits is False:
        planned = replace(planned, remedies=nearest_that_fit(job, planner.plan, planner.could_fit))
    return planned


@dataclass(frozen=True)
class _Planner:
    """Plans variations of a job for one model and one pair of budgets."""

    model: nn.Module
    budget_bytes: int | None
    host_budget_bytes: int | None
    activations: dict[tuple[bool, int], int] = field(default_factory=dict)
    """Of the jobs that were run, by checkpointing and size of the micro-batch: stages, ranks and offload leave them
    as they are."""

    def at_least(self, job: Job) -> tuple[int, int]:
        """Device and host bytes of the states between steps, with activations where they are known: less is never
        needed.
        """
        device, host = _sums(resting_bytes(self.model, job), job)
        return device + self.activations.get(_activity(job), 0), host

    def could_fit(self, job: Job) -> bool:
        """Whether states and known activations leave room."""
        device, host = self.at_least(job)
        return within(device, self.budget_bytes) and within(host, self.host_budget_bytes)

    def plan(self, job: Job) -> Plan:
        """Run the job without memory, or add up its states where there is no micro-batch."""
        states_only = job.micro_batch is None
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
    """Device and host bytes; on a CPU the first has everything."""
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
    """Memory that operations take while they run, which no tensor shows: packed operands, sums of each thread; on an
    accelerator the workspaces of its matrix library.
    """
    largest = max(p.both.num_bytes for p in outcome.phases.values())
    return largest // 100 + (64 << 10 if device.type == "cpu" else 40 << 20)


def _build(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    try:
        with torch.device("meta"):
            return model()
    except (NotImplementedError, RuntimeError):
        return model()  # it looks at values while it is constructed


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _device(device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def default_loss(output: Any) -> Tensor:
    """The output if it is a scalar, its `loss`, or the loss of its first element; else the mean of the tensor."""
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
        f"the model returns {type(output).__name__}: pass loss=, a function from it to a scalar tensor"
    )
