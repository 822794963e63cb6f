"""Pipeline models: their place in a job, and a `RunsPipeline` made of ds_pipe and ds_zero."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

import ds_zero
from ds_engine.build import self_reducing
from ds_engine.build.topology import Meshes, counts_on
from ds_engine.build.zero import ZeroState, require_same
from ds_engine.config import ConfigError, DsConfig
from ds_engine.interfaces import Roles, StateNames, World
from ds_engine.job import Job, PipelineChoice
from ds_engine.job.topology import Axis, Topology

if TYPE_CHECKING:
    from ds_pipe.model import Pipeline, PipelineGroups, PipelineModule

_TIED = "tied_modules."


def choice_of(model: object) -> PipelineChoice | None:
    """Returns the stages of a `ds_pipe.model.PipelineModule`; None for another model."""
    module = _pipeline_module(model)
    if module is None:
        return None
    return PipelineChoice(
        num_stages=module.num_stages,
        schedule=module.schedule_name,
        parts=tuple(module.parts),
        rank_of_stage=module.rank_of_stage,
        ties=bool(module.tie_groups()),
    )


def _pipeline_module(model: object) -> PipelineModule | None:
    if "ds_pipe.model" not in sys.modules:  # then nothing is one of its modules
        return None
    from ds_pipe.model import PipelineModule

    return model if isinstance(model, PipelineModule) else None


def refuse(model: object, doing: str) -> None:
    """Raises ValueError for a pipeline model.

    Args:
        doing: the command that does not know them.
    """
    if choice_of(model) is not None:
        raise ValueError(
            f"{doing}: the model is a PipelineModule, of which every rank has other layers, and this command trains or "
            "plans one model on all ranks. Give it the layers as one nn.Sequential; `ds pipe choose` predicts the "
            "schedule and the memory of activations"
        )


@dataclass(frozen=True, kw_only=True)
class Placed:
    """The process groups of a pipeline model, and its place among all ranks."""

    module: PipelineModule
    groups: PipelineGroups
    topology: Topology
    meshes: Meshes


def place(settings: DsConfig, model: nn.Module, world: World, mpu: Any) -> Placed | None:
    """Makes the process groups of a pipeline model; None for another model. Collective.

    Raises:
        ConfigError: on every rank, if ranks divide the model differently, a rank has nothing to train, the
            configuration contradicts the model, or an `mpu` was passed.
    """
    module = _pipeline_module(model)
    if module is None:
        return None
    if mpu is not None:
        raise ConfigError(
            [
                "mpu: a PipelineModule defines the groups of all axes itself: remove the argument, and pass "
                "PipelineModule(topology=PipeModelDataParallelTopology(...)) for tensor-parallel layers"
            ]
        )
    from ds_pipe.model import PipelineGroups

    _check_schedule(settings, module)
    _check_ranks(module, world)
    groups = PipelineGroups(module)
    grid = module.process_topology
    at = dict(zip(grid.axes, grid.get_coord(world.rank), strict=True))
    axes = {axis: Axis(at.get(axis, 0), max(1, grid.get_dim(axis))) for axis in ("pipe", "data", "model")}
    topology = Topology(pipe=axes["pipe"], data=axes["data"], tensor=axes["model"])
    kind = world.device.type
    assert groups.data is not None and groups.model is not None
    tied = {
        ranks: DeviceMesh.from_group(group, kind, mesh_dim_names=("tied",))
        for ranks, group in groups.tied_data.items()
    }
    mesh_of = {name: tied[ranks] for name, ranks, _ in module.tied_parameters() if ranks in tied}
    across = groups.model if topology.model.size > 1 else None
    meshes = Meshes(
        data=DeviceMesh.from_group(groups.data, kind, mesh_dim_names=("data",)),
        model_parallel=None
        if across is None
        else ds_zero.ModelParallel(group=across, is_cut=counts_on(topology.tensor.index == 0)),
        mesh_for=(lambda name, _: mesh_of.get(name)) if mesh_of else None,
    )
    interval = settings.pipeline.activation_checkpoint_interval
    if interval > 0:
        module.recompute_every(interval)
    return Placed(module=module, groups=groups, topology=topology, meshes=meshes)


def _check_schedule(settings: DsConfig, module: PipelineModule) -> None:
    name = settings.pipeline.schedule
    try:
        module.make_schedule(4 * module.num_stages, None if name == "auto" else name)
    except ValueError as error:
        raise ConfigError([f"pipeline.schedule: {error}"], settings.origin.where) from None


def _check_ranks(module: PipelineModule, world: World) -> None:
    """Compares the division on all ranks, and what they have to train. Collective."""
    described = {
        "the division of the layers": repr(choice_of(module)),
        "the topology": repr(module.process_topology),
        "the tied layers": repr(module.tie_groups()),
    }
    require_same(described, world.device)
    trained: list[Any] = [None] * world.world_size
    own = module.stage_id, sum(p.requires_grad for p in module.parameters())
    if world.world_size > 1:
        dist.all_gather_object(trained, own)
    else:
        trained = [own]
    idle = sorted({stage for stage, count in trained if count == 0})
    if idle:
        raise ConfigError(
            [
                f"pipeline rank{'s' * (len(idle) > 1)} {', '.join(map(str, idle))} of {module.num_stages} have no "
                f"parameter to train (layers {module.parts}): give PipelineModule another partition_method, or fewer "
                "stages"
            ]
        )


class PipelineState(ZeroState):
    """`ModelState` of the stages of one rank; names and group sizes are those of the whole model."""

    def __init__(self, placed: Placed, optimizer: Optimizer) -> None:
        super().__init__(placed.module, optimizer)
        self._placed = placed
        self._whole = self._gathered(super().names())
        stage = placed.module.stage_id
        self._elsewhere = tuple(
            f"{_TIED}{name.removeprefix(_TIED).partition('.')[0]}."
            for name, ranks, _ in placed.module.tied_parameters()
            if ranks[0] != stage
        )

    def names(self) -> StateNames:
        return self._whole

    def records(self) -> Sequence[ds_zero.ShardRecord]:
        # The parameters of tied layers are divided among all ranks that have them, but each has the buffers.
        return [r for r in super().records() if r.state != "buffer" or not r.fqn.startswith(self._elsewhere)]

    def _gathered(self, own: StateNames) -> StateNames:
        group = self._placed.groups.pipe
        if group is None or dist.get_world_size(group) == 1:
            return own
        every: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(every, own, group)
        tied: dict[str, str] = {}
        for names in every:
            tied |= names.tied
        return StateNames(
            tensors=frozenset().union(*(names.tensors for names in every)),
            frozen=tuple(sorted({name for names in every for name in names.frozen})),
            tied=tied,
            groups=tuple(
                tuple(sorted({name for group in groups for name in group}))
                for groups in zip(*(names.groups for names in every), strict=True)
            ),
        )


def with_state(roles: Roles, placed: Placed, optimizer: Optimizer) -> Roles:
    """Returns the roles with the state of a pipeline model. Collective."""
    if isinstance(optimizer, self_reducing.HasModelParts):
        optimizer.share_norms(placed.groups.model if placed.topology.model.size > 1 else None)
    return replace(roles, state=PipelineState(placed, optimizer))


class ControlOfStages:
    """Control of the stages of a rank whose tied weights are reduced after the step, over the ranks of their stages.

    [Note: tied weights under ZeRO]
    A weight that several stages have is sharded over the data ranks of all of them. Its gathering and its reduction are
    collectives of ranks that are at different places of the schedule, so inside of the schedule they would wait for
    each other forever. So it is gathered before the first action, and gradients are reduced by `step`, after the last.
    """

    def __init__(self, module: nn.Module) -> None:
        own = [m for name, m in module.named_children() if name != _TIED.rstrip(".")]
        self._parts = [ds_zero.control(module, m) for m in own if any(True for _ in m.parameters())]

    def unshard(self, async_op: bool = False) -> Any:
        handles = [part.unshard(async_op=True) for part in self._parts]
        gathering = _Gathering([handle for handle in handles if handle is not None])
        if async_op:
            return gathering
        gathering.wait()
        return None

    def reshard(self) -> None:
        for part in self._parts:
            part.reshard()

    def set_requires_gradient_sync(self, requires_gradient_sync: bool, *, recurse: bool = True) -> None:
        """Does nothing: the step reduces."""


class _Gathering:
    """Several gathers that have been started."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = handles

    def wait(self) -> None:
        for handle in self._handles:
            handle.wait()


class StagesOfJob:
    """`RunsPipeline` over the stages of this rank, which ds_zero has sharded."""

    def __init__(
        self, job: Job, placed: Placed, device: torch.device, scale: Callable[[Tensor], Tensor]
    ) -> None:
        from ds_pipe.model import Controls, Pipeline, PipelineOptions

        module, section = placed.module, job.settings.pipeline
        whole = ds_zero.control(module)
        if module.tie_groups():
            whole.set_requires_gradient_sync(False)
            stages = ControlOfStages(module)
            controls = Controls(stages=lambda _: stages, ties=ds_zero.control(module, module.tied_modules))
        else:
            controls = Controls(stages=lambda _: whole)
        options = PipelineOptions(
            timeout_s=section.timeout_s,
            around=lambda: job.precision.around_forward(device.type),
            scale=scale,
            device=device,
            schedule=None if section.schedule == "auto" else section.schedule,
            receive_ahead=section.receive_ahead,
            max_unsharded=section.max_unsharded,
        )
        self._placed = placed
        self._pipeline: Pipeline = Pipeline(
            module, job.batch.steps, shardable_for=controls, groups=placed.groups, options=options
        )
        stages_here = module.local_stages
        self.is_first, self.is_last = 0 in stages_here, len(module.rank_of_stage) - 1 in stages_here

    @property
    def num_microbatches(self) -> int:
        return self._pipeline.num_microbatches

    def set_num_microbatches(self, num_microbatches: int) -> None:
        self._pipeline.set_num_microbatches(num_microbatches)

    def train(self, data: Iterable[Any]) -> Tensor:
        return self._pipeline.forward_backward(data)

    def evaluate(
        self, data: Iterable[Any], *, num_microbatches: int, with_loss: bool, keep_outputs: bool
    ) -> tuple[Tensor, tuple[Any, ...]]:
        return self._pipeline.evaluate(
            data, num_microbatches=num_microbatches, with_loss=with_loss, return_outputs=keep_outputs
        )

    def last_group(self) -> tuple[Any, int]:
        return self._placed.groups.pipe, self._placed.groups.last_rank

    def close(self) -> None:
        self._pipeline.close()
        self._placed.groups.close()
