"""Connects the mixtures of experts of a model with the ranks of a job. ds_moe is imported only where its layers are."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

import ds_zero
from ds_engine.build.topology import Meshes
from ds_engine.config import ConfigError, DsConfig
from ds_engine.config.sections.parallel.expert_parallel import ExpertParallelConfig
from ds_engine.interfaces import World
from ds_engine.job import Job
from ds_engine.job.topology import Topology

if TYPE_CHECKING:
    import ds_moe


def connect(
    model: nn.Module,
    settings: DsConfig,
    topology: Topology,
    meshes: Meshes,
    world: World,
    piped: bool = False,
) -> Meshes:
    """Gives each rank its experts, and connects their layers with their groups: first those of a Hugging Face model, if
    the section `expert_parallel` says so. Returns the meshes with those of experts. Collective. To be called before
    layers are cut, which makes tensor-parallel ranks equal.

    Args:
        piped: whether the model is one stage of a pipeline.

    Raises:
        ConfigError: the experts of a layer cannot be divided among these ranks, or the model has no experts.
    """
    section = settings.expert_parallel
    # A model has such layers only if ds_moe was imported to make them; but another pipeline stage may have some.
    installed = "ds_moe" in sys.modules or (piped and importlib.util.find_spec("ds_moe") is not None)
    if not installed and not section.enabled:
        return meshes
    import ds_moe

    try:
        if section.enabled:
            _convert(model, section, topology, piped)
        experts = ds_moe.expert_mesh(model, meshes.data, all_to_all=_all_to_all(section, world))
    except ValueError as error:
        raise ConfigError([_named(error)]) from None
    if not experts.meshes:
        return meshes
    others = meshes.mesh_for
    return replace(meshes, mesh_for=experts if others is None else _Either(experts, others), experts=True)


def divide_for_inference(model: nn.Module, ep_size: int, world: World) -> bool:
    """Keeps this rank's experts of a Hugging Face model. Returns whether experts of the model are divided.

    Raises:
        ConfigError: the model has no experts, or the ranks do not divide them.
    """
    if ep_size > 1:
        import ds_moe

        try:
            ds_moe.convert(model, ep_size=ep_size, index=world.rank % ep_size)
        except ValueError as error:
            raise ConfigError([f"ep_size: {error}"], "the inference configuration") from None
    if "ds_moe" not in sys.modules:
        return False
    import ds_moe

    return any(layer.ep_size > 1 for _, layer in ds_moe.expert_parallel_layers(model))


def connect_for_inference(model: nn.Module) -> None:
    """Connects divided experts of a model whose other parameters are whole. Collective.

    Raises:
        ConfigError: the ranks do not divide the experts.
    """
    import ds_moe

    try:
        ds_moe.expert_mesh(model)
    except ds_moe.ExpertParallelError as error:
        raise ConfigError([str(error)], "the inference configuration") from None


def _named(error: ValueError) -> str:
    """Returns the text of an error; of ds_moe's own errors as it is, which name the layer's argument."""
    import ds_moe

    text = str(error)
    return text if isinstance(error, ds_moe.ExpertParallelError) else f"expert_parallel: {text}"


def _convert(model: nn.Module, section: ExpertParallelConfig, topology: Topology, piped: bool) -> None:
    """Converts the experts of a Hugging Face model; a model of ds_moe's layers, or a pipeline, has divided its own."""
    import ds_moe

    size = section.autoep_size
    if piped or (size == 1 and ds_moe.has_experts(model)):
        if size > 1:
            raise ConfigError(
                [
                    f"expert_parallel.autoep_size is {size}, but a PipelineModule has constructed its layers already: "
                    "set it to 1, and give its layers ep_size"
                ]
            )
        return
    if ds_moe.has_experts(model):
        own = sorted({layer.ep_size for _, layer in ds_moe.expert_parallel_layers(model)})
        raise ConfigError(
            [
                f"expert_parallel.autoep_size is {size}, but the model has layers of ds_moe, with ep_size "
                f"{', '.join(map(str, own))}: remove it"
            ]
        )
    ds_moe.convert(model, ep_size=size, index=topology.shards.index % size)


def _all_to_all(section: ExpertParallelConfig, world: World) -> Any:
    """Returns how tokens are exchanged."""
    from ds_comm.exchange import HierarchicalAllToAll, PlainAllToAll, QuantizedAllToAll

    two_hops = section.enabled and section.all_to_all == "hierarchical"
    rows = (
        HierarchicalAllToAll(section.ranks_per_machine or world.local_size) if two_hops else PlainAllToAll()
    )
    bits = section.all_to_all_bits if section.enabled else None
    return rows if bits is None else QuantizedAllToAll(bits, rows)


def cut(model: nn.Module, settings: DsConfig, group: dist.ProcessGroup | None) -> None:
    """Cuts experts among tensor-parallel ranks, where the section or their layers say so; otherwise all of these ranks
    compute whole experts. To be called after the other layers are cut.

    Raises:
        ConfigError: experts that cannot be cut, or sizes that the ranks do not divide.
    """
    section = settings.expert_parallel
    size = section.expert_tensor_parallel_size if section.enabled else 1
    ranks = 1 if group is None else group.size()
    if size not in (1, ranks):
        raise ConfigError(
            [
                f"expert_parallel.expert_tensor_parallel_size is {size}, and {ranks} ranks share each layer: set it to "
                "1 for whole experts, or tensor_parallel.autotp_size to the same number"
            ]
        )
    if group is None or "ds_moe" not in sys.modules:
        return
    import ds_moe
    from ds_layers.tensor import keep_part

    for name, layer in ds_moe.expert_parallel_layers(model):
        if size == 1 and not layer.divides_experts:
            continue
        try:
            params = dict(layer.named_parameters())  # type: ignore[attr-defined]
            for own, (dim, sections) in layer.tensor_dims().items():
                total = params[own].shape[0] * layer.ep_size
                keep_part(params[own], group, dim, sections=sections, whole_length=total)
        except ValueError as error:
            raise ConfigError([f"expert_parallel: experts of {name!r}: {error}"]) from None
        layer.divide(group)


def check_reduction(meshes: Meshes, reduces_itself: bool) -> None:
    """Raises ConfigError if experts are divided, and the optimizer averages gradients, as 1-bit Adam does."""
    if meshes.experts and reduces_itself:
        raise ConfigError(
            [
                "optimizer: it averages each gradient over all ranks, but the model divides its experts, so that ranks "
                'hold different ones; set optimizer.type to "AdamW", or ep_size of the layers to 1'
            ]
        )


class _Either:
    """A `mesh_for` of experts, and of other parameters with a mesh of their own: weights that pipeline stages share."""

    def __init__(self, experts: ds_moe.ExpertMesh, others: ds_zero.MeshFor) -> None:
        self._experts, self._others = experts, others

    def __call__(self, name: str, param: nn.Parameter) -> Any:
        return self._experts(name, param) if name in self._experts else self._others(name, param)

    def stacked_over(self, name: str, param: nn.Parameter) -> Any:
        return self._experts.stacked_over(name, param)


def sizes_of_experts(model: nn.Module) -> Mapping[str, int]:
    """Returns the name of each parameter of experts that are divided among ranks -> number of ranks that together hold
    the experts of its layer.
    """
    if "ds_moe" not in sys.modules:
        return {}
    import ds_moe

    return ds_moe.expert_sizes(model)


def convert_for_plan(model: nn.Module, settings: DsConfig, topology: Topology) -> None:
    """Converts the experts of a Hugging Face model, if the section `expert_parallel` says so.

    Raises:
        ConfigError: the model has no experts, or they cannot be divided.
    """
    if settings.expert_parallel.enabled:
        try:
            _convert(model, settings.expert_parallel, topology, piped=False)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError([_named(error)]) from None


def connect_for_plan(model: nn.Module, group_of: Callable[[int], dist.ProcessGroup]) -> None:
    """See `ds_moe.connect_for_plan`."""
    import ds_moe

    ds_moe.connect_for_plan(model, group_of)


def curves(job: Job, model: nn.Module) -> Callable[[int], Mapping[str, float]] | None:
    """Returns what computes the curves of experts after a step, on all ranks: for each layer the share of its tokens
    that each expert was chosen by, the share of dropped assignments, and the mean entropy of the router, since the last
    time. None if no monitor writes them, or the model has no experts.
    """
    settings = job.settings
    monitors = (settings.csv_monitor, settings.tensorboard, settings.wandb, settings.comet)
    if "ds_moe" not in sys.modules or not any(monitor.enabled for monitor in monitors):
        return None
    import ds_moe

    # The ranks of a pipeline have different layers, which no collective can add up.
    if job.pipeline is not None or not ds_moe.has_experts(model):
        return None
    every = settings.steps_per_print or 1

    def of_step(step: int) -> Mapping[str, float]:
        values: dict[str, float] = {}
        if step % every != 0:
            return values
        for report in ds_moe.reports(model):
            assignments = max(sum(report.load), 1)
            prefix = f"Train/Experts/{report.name}"
            for expert, load in enumerate(report.load):
                values[f"{prefix}/load_{expert}"] = load / assignments
            values[f"{prefix}/dropped"] = report.dropped / assignments
            if not math.isnan(report.entropy):
                values[f"{prefix}/entropy"] = report.entropy
        return values

    return of_step


def balance(model: nn.Module, optimizer: Optimizer, meshes: Meshes) -> None:
    """Lets every step of the optimizer move the biases of routers that are balanced by them."""
    if "ds_moe" not in sys.modules:
        return
    import ds_moe

    if not ds_moe.has_biases(model):
        return
    mesh = meshes.data
    axes = () if mesh is None else tuple(mesh.get_group(axis) for axis in range(mesh.ndim))
    groups: tuple[dist.ProcessGroup, ...] | None = axes or None

    def after_step(*_: Any) -> None:
        ds_moe.update_biases(model, groups)

    optimizer.register_step_post_hook(after_step)
