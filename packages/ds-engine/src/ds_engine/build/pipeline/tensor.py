"""Tensor parallelism inside of the stages of a pipeline: which ranks share layers, and what cuts these.

[Note: who cuts the layers of a stage]
Three ways lead to layers of which each rank of the axis `model` has a part:

* the section `tensor_parallel`: the engine cuts the layers of every stage by a plan;
* layers that ds-layers has cut, or whose parameters are DTensors, when the `PipelineModule` constructed them;
* layers with collectives of their own, in the groups of an `mpu`, whose parameters have Megatron's attribute
  `tensor_model_parallel`.

With the first two it is known which part of a whole tensor a rank has, so that checkpoints contain whole tensors, and
load on any number of tensor-parallel ranks. With the third, they contain the tensors of each rank.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed import ProcessGroup, get_process_group_ranks
from torch.optim import Optimizer

import ds_zero
from ds_engine.build.layers.tensor import plan_of_section, ranks_of_dtensors
from ds_engine.build.zero import gathered
from ds_engine.config import ConfigError, DsConfig
from ds_engine.interfaces import World

if TYPE_CHECKING:
    from ds_pipe.model import PipelineGroups, PipelineModule

_GROUPS = {
    "data": ("get_data_parallel_group",),
    "tensor": ("get_tensor_model_parallel_group", "get_slice_parallel_group"),
    "pipe": ("get_pipeline_model_parallel_group", "get_pipe_parallel_group"),
}
"""Group of a pipeline -> the methods of an `mpu` that return it."""


def refine(module: PipelineModule, settings: DsConfig, mpu: Any, world: World) -> bool:
    """Divides the data-parallel ranks of the model's topology, if tensor-parallel ranks are configured, or an `mpu` or
    the layers have them. Collective.

    Returns:
        Whether it is known which parts of whole tensors ranks hold, [Note: who cuts the layers of a stage].

    Raises:
        ConfigError: on every rank, for different numbers of tensor-parallel ranks.
    """
    from ds_pipe.model import PipeModelDataParallelTopology

    asked = _method(mpu, "get_tensor_model_parallel_world_size", "get_slice_parallel_world_size")
    cut, marked = _cut_into(module)
    own = {"the section tensor_parallel": settings.tensor_parallel.ranks, "the layers": cut}
    if asked is not None:
        own["mpu"] = int(asked())
    every: list[tuple[dict[str, int], bool]] = gathered((own, marked), world.world_size)
    here = module.process_topology.get_dim("model")
    said = {f"{who} ({size})": size for sizes, _ in every for who, size in sizes.items() if size > 1}
    if here > 1:
        said[f"{module.process_topology} ({here})"] = here
    if len(set(said.values())) > 1:
        raise ConfigError(
            [
                f"tensor-parallel ranks: {' and '.join(sorted(said))} contradict each other: give all the same number"
            ]
        )
    size = next(iter(said.values()), 1)
    data = module.process_topology.get_dim("data") or 1
    if here <= 1 and size > 1:
        if data % size:
            raise ConfigError(
                [
                    f"{' and '.join(sorted(said))}: they do not divide the {data} ranks of each of "
                    f"{module.num_stages} stages: start {module.num_stages * size} ranks, or a multiple"
                ]
            )
        module.refine_topology(PipeModelDataParallelTopology(module.num_stages, size, data // size))
    known = any(n > 1 for sizes, _ in every for who, n in sizes.items() if who != "mpu")
    if known and any(is_marked for _, is_marked in every):
        raise ConfigError(
            [
                "some layers have the attribute tensor_model_parallel, and others are cut by the section "
                "tensor_parallel, by ds-layers or as DTensors: use one kind for all layers, since checkpoints contain "
                "either whole tensors or those of each rank"
            ]
        )
    return known


def _cut_into(module: nn.Module) -> tuple[int, bool]:
    """Into how many parts the layers of this rank are cut, and whether some are marked as Megatron's."""
    size = ranks_of_dtensors(module) or 1
    cuts = _cuts()
    if cuts is not None:
        size = max([size, *(cut.size for p in module.parameters() if (cut := cuts("", p)) is not None)])
    marked = any(ds_zero.cut_by_model_parallelism(name, p) for name, p in module.named_parameters())
    return size, marked


def _cuts() -> Callable[[str, nn.Parameter], Any] | None:
    """The function that knows the parts that ds-layers has made; None: it is not imported, so there are none."""
    if "ds_layers.tensor" not in sys.modules:
        return None
    from ds_layers.tensor import cut_of

    return cut_of


def check_mpu(mpu: Any, groups: PipelineGroups, world: World) -> None:
    """Checks that an `mpu` divides the ranks as the pipeline does, and notes its groups. Collective.

    Raises:
        ConfigError: on every rank, if a rank has other neighbours.
    """
    if mpu is None:
        return
    wrong = []
    alone = [world.rank]
    for axis, names in _GROUPS.items():
        ask, group = _method(mpu, *names), getattr(groups, axis)
        if ask is None:
            if axis == "data":
                wrong.append(f"{type(mpu).__name__} has no method {names[0]}")
            continue
        theirs: ProcessGroup = ask()
        there = get_process_group_ranks(theirs)
        here = alone if group is None else get_process_group_ranks(group)
        if there != here:
            wrong.append(
                f"rank {world.rank} shares the axis {axis} with ranks {there} by {names[0]}, not {here}"
            )
        elif len(there) > 1:
            groups.borrowed.append(theirs)
    every: list[list[str]] = gathered(wrong, world.world_size)
    if any(every):
        raise ConfigError(
            [
                f"mpu and the PipelineModule divide the ranks differently: {next(w for w in every if w)[0]}. Pass "
                "PipelineModule(topology=PipeModelDataParallelTopology(...)) with the sizes and the order of the mpu"
            ]
        )


def _method(mpu: Any, *names: str) -> Callable[[], Any] | None:
    methods = (getattr(mpu, name, None) for name in names)
    return next((method for method in methods if callable(method)), None)


def model_parallel(groups: PipelineGroups, *, is_first: bool, known: bool) -> ds_zero.ModelParallel:
    """Returns the axes `pipe` and `model` together, for `ds_zero.shard`.

    Args:
        is_first: whether this rank is the first of those that share its layers, which counts whole tensors in norms.
        known: as `refine` returns.
    """
    assert groups.model is not None
    cut_of = _cuts() if known else None

    def counts(fqn: str, param: nn.Parameter) -> bool:
        if is_first or ds_zero.cut_by_model_parallelism(fqn, param):
            return True
        return cut_of is not None and cut_of(fqn, param) is not None

    return ds_zero.ModelParallel(
        group=groups.model,
        is_cut=counts,
        part_of=cut_of,
        part_group=groups.tensor if known else None,
    )


def cut_stages(module: PipelineModule, settings: DsConfig, groups: PipelineGroups, optimizer: Any) -> None:
    """Cuts the layers of this rank's stages, in place, or takes the parts of DTensors. Collective over the pipeline's
    and the tensor-parallel ranks.

    Raises:
        ConfigError: on the ranks of all stages, for sizes that the ranks do not divide, or layers without a plan.
    """
    if groups.tensor is None:
        return
    from ds_layers import tensor

    problem: str | None = None
    try:
        mesh = tensor.localize(module, optimizer if isinstance(optimizer, Optimizer) else None)
        if mesh is not None:
            group = mesh.get_group()
            here, there = get_process_group_ranks(groups.tensor), get_process_group_ranks(group)
            if here != there:
                problem = f"layers are cut among ranks {there}, and in the topology {here} share a stage"
            groups.borrowed.append(group)
    except ValueError as error:
        problem = str(error)
    _raise_on_all(problem, groups)
    if settings.tensor_parallel.ranks == 1:
        return
    plan, problem = _plan(module, settings, groups), None
    try:
        ties = nn.ModuleDict({"tied_modules": module.tied_modules})
        tied = tensor.matching(ties, {name: style for name, style in plan.items() if style != "replicated"})
        if tied:
            raise ValueError(
                f"{', '.join(tied)} cuts tied layers, whose other uses would see a part of the weight: leave it out"
            )
        tensor.parallelize(module, groups.tensor, plan=tensor.matching(module, plan))
    except ValueError as error:
        problem = str(error)
    _raise_on_all(problem, groups)


def _plan(module: PipelineModule, settings: DsConfig, groups: PipelineGroups) -> dict[str, str]:
    """The plan for the layers of all stages. Collective.

    Raises:
        ConfigError: on the ranks of all stages, if no layer of any stage matches.
    """
    from ds_layers.tensor import matching

    plan: dict[str, str] = {}
    problem = None
    try:
        plan = plan_of_section(settings.tensor_parallel, module)
    except ValueError as error:
        problem = str(error)
    if settings.tensor_parallel.vocab_parallel_lm_head:
        plan.setdefault(str(module.parts[-1] - 1), "column_gathered")
    every = _gathered((plan, problem), groups)
    merged: dict[str, str] = {}
    for theirs, _ in every:
        merged = {**theirs, **merged}
    # A stage without a block of a known family has no plan of its own, and needs none.
    problems = [said for _, said in every if said is not None]
    if not merged and problems:
        raise ConfigError([f"tensor_parallel: {problems[0]}"])
    if not any(_gathered(bool(matching(module, merged)), groups)):
        raise ConfigError(
            [
                f"tensor_parallel: no layer of any stage matches the plan {merged}: names begin with the number of "
                "the layer, as in 3.mlp.up"
            ]
        )
    return merged


def _gathered(value: Any, groups: PipelineGroups) -> list[Any]:
    """The values of the ranks of all stages."""
    return [value] if groups.pipe is None else gathered(value, groups.pipe.size(), groups.pipe)


def _raise_on_all(problem: str | None, groups: PipelineGroups) -> None:
    problems = [p for p in _gathered(problem, groups) if p is not None]
    if problems:
        raise ConfigError([f"tensor_parallel: {problems[0]}"])
