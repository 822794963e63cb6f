"""Which ranks have which stages of a pipeline model, and the process groups between them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ds_engine.build.pipeline import tensor
from ds_engine.build.topology import Meshes
from ds_engine.build.zero import gathered, require_same
from ds_engine.config import ConfigError, DsConfig
from ds_engine.interfaces import World
from ds_engine.job import PipelineChoice
from ds_engine.job.topology import Axis, Topology

if TYPE_CHECKING:
    from ds_pipe.model import PipelineGroups, PipelineModule


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
        ConfigError: on every rank, if ranks divide the model differently, a rank has nothing to train, or the
            configuration or `mpu` contradicts the model.
    """
    module = _pipeline_module(model)
    if module is None:
        return None
    from ds_pipe.model import PipelineGroups

    _check_schedule(settings, module)
    known = tensor.refine(module, settings, mpu, world)
    _check_ranks(module, world)
    groups = PipelineGroups(module)
    try:
        tensor.check_mpu(mpu, groups, world)
    except ConfigError:
        groups.close()
        raise
    grid = module.process_topology
    at = dict(zip(grid.axes, grid.get_coord(world.rank), strict=True))
    axes = {axis: Axis(at.get(axis, 0), max(1, grid.get_dim(axis))) for axis in ("pipe", "data", "model")}
    topology = Topology(pipe=axes["pipe"], data=axes["data"], tensor=axes["model"], logical=known)
    kind = world.device.type
    assert groups.data is not None and groups.model is not None
    tied = {
        ranks: DeviceMesh.from_group(group, kind, mesh_dim_names=("tied",))
        for ranks, group in groups.tied_data.items()
    }
    mesh_of = {name: tied[ranks] for name, ranks, _ in module.tied_parameters() if ranks in tied}
    meshes = Meshes(
        data=DeviceMesh.from_group(groups.data, kind, mesh_dim_names=("data",)),
        tensor=groups.tensor if known else None,
        model_parallel=tensor.model_parallel(groups, is_first=topology.tensor.index == 0, known=known)
        if topology.model.size > 1
        else None,
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
    own = module.stage_id, sum(p.requires_grad for p in module.parameters())
    trained: list[tuple[int, int]] = gathered(own, world.world_size)
    idle = sorted({stage for stage, count in trained if count == 0})
    if idle:
        raise ConfigError(
            [
                f"pipeline rank{'s' * (len(idle) > 1)} {', '.join(map(str, idle))} of {module.num_stages} have no "
                f"parameter to train (layers {module.parts}): give PipelineModule another partition_method, or fewer "
                "stages"
            ]
        )
