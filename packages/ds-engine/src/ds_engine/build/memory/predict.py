"""Calls `ds_zero.plan` for a job."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from torch.optim import Optimizer

import ds_zero
from ds_engine.build.comm import planned_collectives
from ds_engine.build.moe import sizes_of_experts
from ds_engine.build.offload import budget_notes, place, planned_activations, tiers_of
from ds_engine.build.optimizer import maker_of
from ds_engine.build.zero import zero_config
from ds_engine.job import Job, Placement

if TYPE_CHECKING:
    from ds_offload.budget.plan import Placed
    from ds_zero.predict.simulate import RanksFor


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """Memory limits of one rank, in bytes; None: no limit."""

    device_bytes: int | None = None
    host_bytes: int | None = None


def predicted(
    job: Job,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    micro_batch: Any = None,
    checkpointing: bool = False,
    budgets: Budgets = Budgets(),
    stage: int | None = None,
    placement: Placement | None = None,
    accumulation: Literal["local", "sharded"] | None = None,
) -> ds_zero.Plan:
    """Predicts memory and messages of one rank of a job.

    Args:
        optimizer: an optimizer over the model's parameters; None: the optimizer of the job.
        micro_batch: arguments of one forward; None: plans only the states between steps.
        checkpointing: recompute the activations of every block.
        stage, placement: override those of the job.
        accumulation: overrides `ZeroConfig.accumulation`.

    Raises:
        ValueError: the model cannot be planned.
    """
    where = placement or job.placement
    made = optimizer or maker_of(job, model)
    common = _arguments(job, model, stage)
    if accumulation is not None:
        common["config"] = replace(common["config"], accumulation=accumulation)
    if placement is None and job.placement.by_budget:
        chosen = placed(job, model, made, stage=stage)
        note = f"placement within offload.budget:\n{chosen}"
        tiers, notes = chosen.tiers, [note, *budget_notes(job, chosen)]
    else:
        tiers, notes = tiers_of(where), []
    moved = None if micro_batch is None else planned_activations(job)
    plan = ds_zero.plan(
        model,
        micro_batch,
        optimizer=made,
        tiers=tiers,
        activations=moved,
        checkpointing=checkpointing,
        budget_bytes=budgets.device_bytes,
        host_budget_bytes=budgets.host_bytes,
        **common,
    )
    if moved is not None and moved.choice is not None:
        notes.append(f"activations within offload.budget: {moved.choice}")
    return replace(plan, notes=(*plan.notes, *notes))


def placed(
    job: Job,
    model: nn.Module,
    optimizer: Optimizer | Callable[[Any], Optimizer] | None = None,
    *,
    stage: int | None = None,
) -> Placed:
    """Returns where the job's budget places each tensor of a rank. Pure: the same on every rank.

    Raises:
        ConfigError: the state does not fit.
        ValueError: the model cannot be planned.
    """
    made = optimizer or maker_of(job, model)
    return place(job, ds_zero.plan(model, optimizer=made, **_arguments(job, model, stage)).tensors)


def _arguments(job: Job, model: nn.Module, stage: int | None) -> dict[str, Any]:
    topology = job.topology
    return {
        "stage": job.stage if stage is None else stage,
        "ranks": topology.samples.size * topology.sequence.size,
        "accumulation_steps": job.batch.steps,
        "config": zero_config(job, model),
        "shard_ranks": topology.shards.size if topology.replicate.size > 1 else None,
        "loss_scale": job.precision.loss_scaling is not None,
        "clip": math.isfinite(job.clipping),
        "ranks_for": _ranks_for(job, model),
        "device": job.device_type,
        "comm": planned_collectives(job),
    }


def _ranks_for(job: Job, model: nn.Module) -> RanksFor | None:
    """Returns among how many ranks each parameter of experts is sharded; None if no experts are divided."""
    sizes = sizes_of_experts(model)
    if not sizes:
        return None
    shards = job.topology.shards.size

    def ranks_for(fqn: str, param: nn.Parameter) -> int | None:
        return shards // sizes[fqn] if fqn in sizes else None

    return ranks_for
