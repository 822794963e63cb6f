"""Predicts memory and bubble of a pipeline model: one plan for each of its ranks.

[Note: plan of a pipeline]
A rank of a pipeline is planned like a model of its own: its stages, sharded over its data-parallel ranks. What differs
is how many micro-batches keep activations at the same time, which the schedule says. So the planned model computes as
many forwards as the schedule has at its peak, and then their backwards. The module is constructed once for each
pipeline rank, as that rank of a group that sends nothing, on the meta device.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import ds_zero
from ds_engine.build.memory.model_axes import as_rank
from ds_engine.build.memory.pipeline_time import PipelineTime, pipeline_time, stage_work
from ds_engine.build.memory.plan import tokens_of
from ds_engine.build.memory.plan_table import Options
from ds_engine.build.memory.predict import predicted
from ds_engine.build.pipeline import choice_of
from ds_engine.build.step_time.sections import Section, axes_section, time_section
from ds_engine.config import DsConfig
from ds_engine.job import Job, PipelineChoice, choices_of, describe
from ds_engine.job.topology import Axis, Topology
from ds_engine.step_time import Cost, Rates, StepTime, cost_of
from ds_zero.tensors.sizes import human_bytes

if TYPE_CHECKING:
    from ds_pipe import Schedule
    from ds_pipe.model import PipelineModule


@dataclass(frozen=True, kw_only=True)
class PipelinePlan:
    """What `ds plan` prints for a pipeline: memory of every pipeline rank, and the bubble of its schedule."""

    plans: tuple[ds_zero.Plan, ...]
    """One for each pipeline rank."""
    in_flight: tuple[Mapping[int, int], ...]
    """For each pipeline rank: stage -> number of its micro-batches that keep activations at the peak."""
    pipeline: PipelineChoice
    num_microbatches: int
    bubble: float
    """Share of the schedule in which ranks do not compute; without rates, if all stages take the same time."""
    timed: PipelineTime | None = None
    """None without rates."""
    cost: Cost | None = None
    """None without a price."""

    @property
    def time(self) -> StepTime | None:
        """The predicted time of a step; None without rates."""
        return None if self.timed is None else self.timed.step

    def sections(self) -> list[Section]:
        """The tables after that of memory."""
        if self.time is None:
            return []
        return [time_section(self.time), axes_section(self.time.axes)]

    @property
    def device_bytes(self) -> int:
        """The peak on the device, of the rank that needs most."""
        return max(plan.device_bytes for plan in self.plans)

    @property
    def host_bytes(self) -> int:
        """The peak in host memory, of the rank that needs most."""
        return max(plan.host_bytes for plan in self.plans)

    @property
    def fits(self) -> bool | None:
        """Whether the peaks of all ranks are within the budgets; None without a budget."""
        verdicts = [plan.fits for plan in self.plans]
        return None if None in verdicts else all(verdicts)

    def title(self) -> str:
        first = self.plans[0]
        data = f"{first.ranks} data-parallel rank{'s' * (first.ranks > 1)}"
        return (
            f"pipeline of {sum(plan.params_numel for plan in self.plans):,} parameters: {self.pipeline}; "
            f"{self.num_microbatches} micro-batches, stage {first.stage}, {data} ({first.device}), {first.optimizer}"
        )

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: a column for each pipeline rank, at its peak."""
        peaks = [max(plan.phases, key=lambda phase: phase.device_bytes) for plan in self.plans]
        header = ["bytes per rank", *(f"pipeline rank {rank}" for rank in range(len(peaks)))]
        purposes = [n for n in peaks[0].parts if any(peak.parts.get(n) for peak in peaks)]
        table = [[n, *(human_bytes(peak.parts.get(n, 0)) for peak in peaks)] for n in purposes]
        table += [
            ["reserve", *(human_bytes(plan.reserve_bytes) for plan in self.plans)],
            ["in all", *(human_bytes(peak.device_bytes) for peak in peaks)],
            ["largest in", *(peak.phase for peak in peaks)],
            ["micro-batches in flight", *(_counts(counts) for counts in self.in_flight)],
        ]
        return header, table

    def verdict(self) -> list[str]:
        """The lines below the table."""
        largest = max(range(len(self.plans)), key=lambda rank: self.plans[rank].device_bytes)
        lines = [f"peak {human_bytes(self.device_bytes)}, of pipeline rank {largest}"]
        if self.fits is not None:
            lines[0] += ": fits" if self.fits else ": does not fit"
        if self.time is None:
            lines.append(
                f"bubble {self.bubble:.1%} if all stages take the same time; `ds pipe choose` compares schedules"
            )
        else:
            lines.append(f"bubble {self.bubble:.1%}; `ds pipe choose` compares schedules")
            lines.append(str(self.time))
        if self.cost is not None:
            lines += self.cost.lines()
        return lines + [f"note: {note}" for plan in self.plans[:1] for note in plan.notes]

    def to_json(self) -> str:
        """All plans, and the fields of this class."""
        return json.dumps(
            {
                "ranks": [json.loads(plan.to_json()) for plan in self.plans],
                "in_flight": [
                    {str(stage): count for stage, count in counts.items()} for counts in self.in_flight
                ],
                "pipeline": str(self.pipeline),
                "num_microbatches": self.num_microbatches,
                "bubble": self.bubble,
                "time": None if self.time is None else asdict(self.time),
                "cost": None if self.cost is None else asdict(self.cost),
                "device_bytes": self.device_bytes,
                "host_bytes": self.host_bytes,
                "fits": self.fits,
            },
            indent=2,
        )


def plan_pipeline(
    settings: DsConfig, factory: Callable[[], Any], ranks: int, options: Options, rates: Rates | None = None
) -> PipelinePlan | None:
    """Plans a pipeline; None if the factory makes another model.

    Args:
        factory: makes a `PipelineModule`, or one and the example (inputs, labels) of a micro-batch. Without an example
            only the states between steps are planned.
        ranks: number of ranks of the whole job.
        rates: of the machines, for the time of a step; None: it is not predicted.

    Raises:
        ConfigError: the batch sizes contradict each other on this number of ranks.
        ValueError: the model cannot be planned, or a process group exists already.
    """
    made = _made(factory, 0, ranks)
    if made is None:
        return None
    module, example = made
    choice = choice_of(module)
    assert choice is not None
    value, labels = example if isinstance(example, (tuple, list)) and len(example) == 2 else (example, None)
    if value is None and rates is not None:
        raise ValueError(
            "predicting the time needs a micro-batch: return (model, (inputs, labels)) from the function"
        )
    plans, in_flight = [], []
    modules = [module, *_others(factory, module, choice.num_stages, ranks)]
    jobs = [_job(settings, choice, index, ranks, options) for index in range(choice.num_stages)]
    samples = options.micro_batch or jobs[0].batch.micro
    values, kept = ({}, {}) if value is None else _values(modules, choice, _sized(value, samples))
    name = settings.pipeline.schedule
    schedule = module.make_schedule(jobs[0].batch.steps, None if name == "auto" else name)
    target = None if labels is None else _sized(labels, samples)
    last, works = len(choice.rank_of_stage) - 1, {}
    for index, (own, job) in enumerate(zip(modules, jobs, strict=True)):
        counts = in_flight_of(schedule, index, kept)
        inputs = None
        if value is not None:
            inputs = ([(values[stage], count) for stage, count in counts.items()], target)
        model = _InFlight(own, tuple(counts), last, job.stage == 3)
        under_way = 0 if value is None else _message_bytes(choice.rank_of_stage, index, values)
        plans.append(_planned(job, own, model, inputs, options, under_way))
        in_flight.append(counts)
        for stage in counts if rates is not None else ():
            works[stage] = stage_work(
                _InFlight(own, (stage,), last, False),
                values[stage],
                target,
                None if stage == last else values[stage + 1],
                _stage_numel(own, stage),
            )
    from ds_pipe import simulate

    timed = cost = None
    if rates is not None:
        timed = pipeline_time(schedule, works, jobs, plans, rates)
        cost = _cost(timed, rates, jobs[0], samples, value, options)
    return PipelinePlan(
        plans=tuple(plans),
        in_flight=tuple(in_flight),
        pipeline=choice,
        num_microbatches=jobs[0].batch.steps,
        bubble=(simulate(schedule) if timed is None else timed.simulation).bubble,
        timed=timed,
        cost=cost,
    )


def _cost(
    timed: PipelineTime, rates: Rates, job: Job, samples: int, value: Any, options: Options
) -> Cost | None:
    return cost_of(
        timed.step.total_s,
        rates,
        ranks=job.topology.world_size,
        samples=samples * job.batch.steps * job.topology.samples.size,
        tokens=tokens_of(value),
        steps=options.steps,
    )


def _others(
    factory: Callable[[], Any], module: PipelineModule, num_stages: int, ranks: int
) -> list[PipelineModule]:
    """Makes the modules of the other pipeline ranks."""
    topology, others = module.process_topology, []
    for index in range(1, num_stages):
        rank = topology.get_rank(**{axis: index if axis == "pipe" else 0 for axis in topology.axes})
        made = _made(factory, rank, ranks)
        assert made is not None
        others.append(made[0])
    return others


def in_flight_of(schedule: Schedule, rank: int, kept_bytes: Mapping[int, int]) -> dict[int, int]:
    """Returns how many micro-batches of each stage of a rank keep activations when they take most memory.

    Args:
        schedule: the schedule.
        rank: the pipeline rank.
        kept_bytes: stage -> bytes that a forward keeps; a stage that is not named counts as one byte.
    """
    from ds_pipe.actions import Op, computations

    now = dict.fromkeys(schedule.stages_of(rank), 0)
    most, peak = dict(now), -1
    for action in computations(schedule.actions[rank]):
        if action.op is Op.FORWARD:
            now[action.stage] += 1
        elif action.op in (Op.BACKWARD, Op.BACKWARD_WEIGHT):
            now[action.stage] -= 1
        held = sum(count * kept_bytes.get(stage, 1) for stage, count in now.items())
        if held > peak:
            most, peak = dict(now), held
    return most


class _InFlight(nn.Module):
    """The stages of one rank, whose forward computes several micro-batches before any backward."""

    def __init__(self, module: PipelineModule, stages: Sequence[int], last: int, gathers: bool) -> None:
        super().__init__()
        self.module, self.stages, self.last, self.gathers = module, stages, last, gathers

    def forward(self, values: Sequence[tuple[Any, int]], labels: Any) -> Tensor:
        """Returns the sum of the losses of all micro-batches."""
        if self.gathers:
            ds_zero.control(self).unshard()  # a schedule gathers whole stages
        losses = [
            self._loss(stage, value, labels)
            for stage, (value, count) in zip(self.stages, values, strict=True)
            for _ in range(count)
        ]
        return torch.stack(losses).sum()

    def _loss(self, stage: int, value: Any, labels: Any) -> Tensor:
        if stage:  # every micro-batch has an activation of its own, which has been received
            value = tree_map_only(Tensor, _received, value)
        output = self.module.run_stage(stage, value)
        if stage == self.last and self.module.loss_fn is not None and labels is not None:
            return self.module.loss_fn(output, labels)
        # The product has no saved tensor, and its backward makes a gradient as large as the one that is received.
        parts = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        return torch.stack([(part * 1.0).float().sum() for part in parts]).sum()


def _received(tensor: Tensor) -> Tensor:
    made = tensor.detach().clone()
    return made.requires_grad_() if made.is_floating_point() else made


def _planned(
    job: Job, module: PipelineModule, model: nn.Module, inputs: Any, options: Options, under_way: int
) -> ds_zero.Plan:
    # Each rank adds whole gradients of all micro-batches, and the last backward reduces them.
    plan = predicted(job, model, micro_batch=inputs, budgets=options.budgets(), accumulation="local")
    plan = replace(plan, phases=tuple(_with_messages(phase, under_way) for phase in plan.phases))
    if not any(len(ranks) > 1 for _, ranks, _ in module.tied_parameters()):
        return plan
    note = "tied weights are sharded over the ranks of all their stages, so states take less than is planned here"
    return replace(plan, notes=(*plan.notes, note))


def _job(settings: DsConfig, choice: PipelineChoice, index: int, ranks: int, options: Options) -> Job:
    if settings.tensor_parallel.ranks > 1:
        raise ValueError(
            "tensor_parallel: plans of pipelines count whole layers: plan without the section, and divide the bytes of "
            "the layers that it cuts by autotp_size"
        )
    topology = Topology(pipe=Axis(index, choice.num_stages), data=Axis(0, ranks // choice.num_stages))
    choices = choices_of(settings, device_type=options.device, pipeline=choice)
    return describe(choices, topology, choices.device_type)


def _with_messages(phase: ds_zero.PhaseMemory, num_bytes: int) -> ds_zero.PhaseMemory:
    under_way = num_bytes if phase.phase in ("forward", "backward") else 0
    parts = {**phase.parts, "messages": under_way}
    return replace(phase, device_bytes=phase.device_bytes + under_way, parts=parts)


def _message_bytes(rank_of_stage: Sequence[int], rank: int, values: Mapping[int, Any]) -> int:
    """Returns the bytes of messages that a rank holds at once: what it sends to a neighbour until it has been received,
    and the next receive of every channel, which starts before its message is needed.
    """
    from ds_pipe.executor.group_transport import HELD_MESSAGES

    received, sent = 0, dict[int, int]()
    for stage in range(1, len(rank_of_stage)):
        before, after = rank_of_stage[stage - 1], rank_of_stage[stage]
        if before == after or rank not in (before, after):
            continue
        num_bytes = sum(t.nbytes for t in tree_leaves(values[stage]) if isinstance(t, Tensor))
        received += num_bytes
        neighbour = after if rank == before else before
        sent[neighbour] = max(sent.get(neighbour, 0), num_bytes)
    return received + (HELD_MESSAGES + 1) * sum(sent.values())


def _values(
    modules: Sequence[PipelineModule], choice: PipelineChoice, value: Any
) -> tuple[dict[int, Any], dict[int, int]]:
    """Returns the input of every stage, and the bytes that each keeps for backward, computed on the meta device."""
    values, kept = {0: value}, {}
    for stage, rank in enumerate(choice.rank_of_stage):
        saved: dict[int, int] = {}

        def pack(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                saved[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
            return tensor

        given = values[stage] if stage == 0 else tree_map_only(Tensor, _received, values[stage])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = modules[rank].run_stage(stage, given)
        kept[stage] = max(1, sum(saved.values()))
        values[stage + 1] = tree_map_only(Tensor, Tensor.detach, output)
    return values, kept


def _sized(value: Any, samples: int) -> Any:
    from ds_zero.predict.remedies import with_batch_size  # prediction is not loaded where a job trains

    return tree_map_only(Tensor, lambda tensor: tensor.to("meta"), with_batch_size(value, samples))


def _made(factory: Callable[[], Any], rank: int, ranks: int) -> tuple[PipelineModule, Any] | None:
    """Calls the factory on the meta device, as one rank of the job; None if it makes no pipeline."""
    with as_rank(rank, ranks), torch.device("meta"):
        made = factory()
    model, example = made if isinstance(made, tuple) else (made, None)
    return None if choice_of(model) is None else (model, example)


def _stage_numel(module: PipelineModule, stage: int) -> int:
    """Returns the number of elements of the parameters of a stage."""
    return sum(p.numel() for p in module.stage_module(stage).parameters())


def _counts(counts: Mapping[int, int]) -> str:
    return " + ".join(str(count) for count in counts.values())
