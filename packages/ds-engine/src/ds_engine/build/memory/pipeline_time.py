"""Predicts the time of a step of a pipeline.

[Note: time of a pipeline step]
Operations of each stage are counted as those of a whole model are, and become seconds by the rates of the machine; the
simulator of ds-pipe then runs the schedule with them, with its messages between stages. What all micro-batches share
comes after it: reduction of gradients over the copies of a stage, update, publishing of parameters. The slowest rank
counts there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import ds_zero
from ds_engine.build.step_time.work import ModelWork, itemsize_of, workload
from ds_engine.job import Job
from ds_engine.step_time import AxisTime, Rates, StepTime, Unit, simulate
from ds_zero.predict.dry_run import dry_run

if TYPE_CHECKING:
    from ds_pipe import Schedule, Simulation, StageCosts


@dataclass(frozen=True, kw_only=True)
class StageWork:
    """The operations of one micro-batch on one stage."""

    forward_flops: float
    backward_flops: float
    output_numel: int
    """Elements that are sent to the next stage."""
    params_numel: int


@dataclass(frozen=True, kw_only=True)
class PipelineTime:
    """The predicted time of one optimizer step, and the simulated schedule."""

    step: StepTime
    simulation: Simulation


def stage_work(model: nn.Module, value: Any, labels: Any, output: Any, params_numel: int) -> StageWork:
    """Counts the operations of one stage.

    Args:
        model: called with `[(value, 1)]` and labels; returns the loss of one micro-batch.
        output: what the stage sends.

    Raises:
        ValueError: ds-profiler is not installed, or the stage needs values of tensors.
    """
    try:
        from ds_profiler import FlopsProfiler
    except ModuleNotFoundError:
        raise ValueError("predicting the time needs ds-profiler: pip install 'ds-engine[profiler]'") from None

    def empty(given: Any) -> Any:
        return tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu"), given)

    with dry_run(model) as copied:
        profiler = FlopsProfiler(copied, synchronize=False)
        with profiler:
            copied([(empty(value), 1)], empty(labels)).backward()
    profile = profiler.profile()
    return StageWork(
        forward_flops=float(profile.forward.flops),
        backward_flops=float(profile.backward.flops),
        output_numel=sum(t.numel() for t in tree_leaves(output) if isinstance(t, Tensor)),
        params_numel=params_numel,
    )


def pipeline_time(
    schedule: Schedule,
    works: Mapping[int, StageWork],
    jobs: Sequence[Job],
    plans: Sequence[ds_zero.Plan],
    rates: Rates,
) -> PipelineTime:
    """Simulates a step.

    Args:
        works: of each stage.
        jobs, plans: of each pipeline rank.
    """
    from ds_pipe import Costs
    from ds_pipe import simulate as run

    whole = jobs[0].topology.world_size
    near, _ = rates.links(whole)  # pipeline ranks are as far from each other as there are copies of a stage
    costs = Costs(
        stages=tuple(_costs(works, stage, jobs[0], plans[0], rates) for stage in sorted(works)),
        latency_s=near.latency_s,
        bytes_per_s=near.bytes_per_s,
    )
    simulation = run(schedule, costs)
    ends = [_after_schedule(job, plan, rates) for job, plan in zip(jobs, plans, strict=True)]
    last = max(ends, key=lambda end: end.total_s)
    busy = [0.0] * len(plans)
    for span in simulation.spans:
        if span.action.op.computes:
            busy[span.rank] += span.end - span.start
    sent = max(simulation.sent_bytes)
    pipe = AxisTime(axis="pipe", ranks=len(plans), sent_bytes=float(sent), seconds=sent / near.bytes_per_s)
    total_s, compute_s = simulation.total_s + last.total_s, max(busy)
    return PipelineTime(
        simulation=simulation,
        step=StepTime(
            total_s=total_s,
            compute_s=compute_s,
            messages_s=pipe.seconds + last.messages_s,
            exposed_s=max(0.0, total_s - compute_s - last.update_s),
            update_s=last.update_s,
            axes=(pipe, *last.axes),
        ),
    )


def _costs(
    works: Mapping[int, StageWork], stage: int, job: Job, plan: ds_zero.Plan, rates: Rates
) -> StageCosts:
    from ds_pipe import StageCosts

    work, every = works[stage], works.values()
    forwards, backwards = sum(w.forward_flops for w in every), sum(w.backward_flops for w in every)
    forward_s = work.forward_flops / rates.forward_flops_per_s
    forward_s += rates.forward_pass_s * (work.forward_flops / forwards if forwards else 0.0)
    backward_s = work.backward_flops / rates.backward_flops_per_s
    backward_s += rates.backward_pass_s * (work.backward_flops / backwards if backwards else 0.0)
    itemsize, copies = itemsize_of(plan), plan.ranks
    gather, _ = rates.links(copies)
    sharded = job.stage == 3 and copies > 1
    gathered = work.params_numel * itemsize * (copies - 1) / copies
    return StageCosts(
        forward_s=forward_s,
        backward_input_s=backward_s / 2,
        backward_weight_s=backward_s / 2,
        output_bytes=work.output_numel * itemsize,
        unshard_s=gather.seconds(gathered, copies) if sharded else 0.0,
    )


def _after_schedule(job: Job, plan: ds_zero.Plan, rates: Rates) -> StepTime:
    """Reduction, update and publishing of one pipeline rank."""
    nothing = Unit(name="", numel=plan.params_numel, forward_flops=0.0, backward_flops=0.0)
    work = workload(job, plan, ModelWork(units=(nothing,), samples=1), 1)
    alone = replace(
        work,
        micro_batches=1,
        gather_forward_bytes=0.0,
        gather_backward_bytes=0.0,
        accumulate_bytes=work.accumulate_bytes * work.micro_batches,
    )
    without_pass = replace(rates, forward_pass_s=0.0, backward_pass_s=0.0)
    return simulate(alone, without_pass)
