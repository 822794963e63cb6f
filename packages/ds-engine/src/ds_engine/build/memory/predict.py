"""Calls `ds_zero.plan` for a job."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

import ds_zero
from ds_engine.build.offload import tiers_of
from ds_engine.build.optimizer import maker_of
from ds_engine.build.zero import zero_config
from ds_engine.job import Job, Placement


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
) -> ds_zero.Plan:
    """Predicts memory and messages of one rank of a job.

    Args:
        optimizer: an optimizer over the model's parameters; None: the optimizer of the job.
        micro_batch: arguments of one forward; None: plans only the states between steps.
        checkpointing: recompute the activations of every block.
        stage, placement: override those of the job.

    Raises:
        ValueError: the model cannot be planned.
    """
    topology = job.topology
    where = placement or job.placement
    return ds_zero.plan(
        model,
        micro_batch,
        stage=job.stage if stage is None else stage,
        ranks=topology.samples.size,
        optimizer=optimizer or maker_of(job, model),
        accumulation_steps=job.batch.steps,
        config=zero_config(job, model),
        shard_ranks=topology.data.size if topology.replicate.size > 1 else None,
        loss_scale=job.precision.loss_scaling is not None,
        tiers=tiers_of(where),
        checkpointing=checkpointing,
        clip=math.isfinite(job.clipping),
        device=job.device_type,
        budget_bytes=budgets.device_bytes,
        host_budget_bytes=budgets.host_bytes,
    )
