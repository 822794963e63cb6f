"""`PipelineModule`: a list of layers, of which each rank constructs those of its stages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_pipe.executor.stage import LossFn, Stage, StageOptions
from ds_pipe.interfaces import Shardable
from ds_pipe.model.layer_specs import Layer, LayerSpec, TiedLayerSpec
from ds_pipe.model.partition import balanced, uniform
from ds_pipe.model.profile import LayerProfile
from ds_pipe.model.topology import PipeDataParallelTopology, ProcessTopology
from ds_pipe.schedule.names import make, placement
from ds_pipe.schedule.schedule import Schedule

CheckpointFn = Callable[..., Any]
Around = AbstractContextManager[Any]
_UNDIVIDED: ContextVar[bool] = ContextVar("ds_pipe.undivided", default=False)


@contextmanager
def undivided() -> Iterator[None]:
    """Context manager within which a `PipelineModule` is constructed with all of its layers in one stage on this rank,
    whatever its arguments say of stages and of ranks. It can be called like any module, and has the same names.
    """
    token = _UNDIVIDED.set(True)
    try:
        yield
    finally:
        _UNDIVIDED.reset(token)


class PipelineModule(nn.Module):
    """A model as a list of layers, divided into stages. The arguments are DeepSpeed's, and two more at the end.

    Each layer takes the output of the previous one as its only argument. Parameters have the names that they would
    have in an `nn.Sequential` of all layers; those of tied layers begin with `tied_modules.`.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        num_stages: int | None = None,
        topology: ProcessTopology | None = None,
        loss_fn: LossFn | None = None,
        seed_layers: bool = False,
        seed_fn: Callable[[int], Any] | None = None,
        base_seed: int = 1234,
        partition_method: str | Sequence[int] | LayerProfile = "parameters",
        activation_checkpoint_interval: int = 0,
        activation_checkpoint_func: CheckpointFn | None = None,
        checkpointable_layers: Sequence[str] | None = None,
        dynamic_shape: bool = False,
        *,
        schedule: str = "1f1b",
        chunks: int | None = None,
    ) -> None:
        """Divides the layers, and constructs those of this rank's stages.

        Args:
            layers: `LayerSpec`, `TiedLayerSpec`, modules, or callables without parameters.
            num_stages: number of pipeline ranks. The other ranks are data-parallel.
            topology: axes of all ranks, instead of `num_stages`.
            loss_fn: called with the output of the last layer and the labels. None: the last layer returns the loss.
            seed_layers: seed the random generator before each layer is constructed, so that its initial values depend
                on its index and not on the number of stages.
            seed_fn: called with the seed. Default: `torch.manual_seed`.
            base_seed: the seed of a layer is `base_seed` plus its index.
            partition_method: "uniform" (numbers of layers), "parameters" (numbers of trainable parameters),
                "type:REGEX" (numbers of layers whose class name matches), bounds by hand (as [0, 3, 8]), or what
                `profile_layers` has measured.
            activation_checkpoint_interval: recompute that many layers at a time in backward. 0: keep activations.
            activation_checkpoint_func: called with a function and its input. Default: torch's, not reentrant.
            checkpointable_layers: names of classes; only layers of these are recomputed. Default: those with
                parameters.
            dynamic_shape: shapes may always vary, so this has no effect.
            schedule: name of the schedule that will train it; "zb-v" and "dualpipev" place two stages on each rank in a
                V, "interleaved" `chunks` stages.
            chunks: stages on each rank, for "interleaved".

        Raises:
            ValueError: a partition that does not fit the layers, or ranks that do not fit `num_stages`.
        """
        super().__init__()
        whole = _UNDIVIDED.get()
        self.process_topology = PipeDataParallelTopology(1, 1) if whole else _topology(num_stages, topology)
        self.num_stages = self.process_topology.get_dim("pipe")
        self.global_rank = dist.get_rank() if dist.is_initialized() and not whole else 0
        self.stage_id: int = getattr(self.process_topology.get_coord(self.global_rank), "pipe")  # noqa: B009
        self.loss_fn, self.schedule_name, self.chunks = loss_fn, schedule, chunks
        self._specs = list(layers)
        self._seed = partial(_seeded, seed_fn or torch.manual_seed, base_seed) if seed_layers else None
        self._recompute = _Recompute(
            activation_checkpoint_interval,
            activation_checkpoint_func or partial(checkpoint, use_reentrant=False),
            checkpointable_layers,
        )
        self.rank_of_stage = (0,) if whole else placement(schedule, self.num_stages, chunks)
        method = [0, len(self._specs)] if whole else partition_method
        self.parts = _bounds(self._specs, method, len(self.rank_of_stage))
        _refuse_repeated(self._specs, self.parts, self.rank_of_stage)
        self.tied_modules = nn.ModuleDict()
        for stage in self.local_stages:
            self._build(stage)
        # In the same order on all ranks, whatever the order in which their stages use them: collectives of tied weights
        # follow it.
        order = [key for key in self._tied_ranks() if key in self.tied_modules]
        self.tied_modules = nn.ModuleDict({key: self.tied_modules[key] for key in order})
        # Modules of other ranks are not kept alive by this one.
        mine = {i for s in self.local_stages for i in range(self.parts[s], self.parts[s + 1])}
        self._specs = [
            s if i in mine or not isinstance(s, nn.Module) else None for i, s in enumerate(self._specs)
        ]
        # Not submodules: parameters would have a second name.
        self._stage_modules = {stage: StageLayers(self, stage) for stage in self.local_stages}

    @property
    def local_stages(self) -> list[int]:
        """The stages of this rank."""
        return [s for s, rank in enumerate(self.rank_of_stage) if rank == self.stage_id]

    def make_schedule(self, num_microbatches: int, name: str | None = None) -> Schedule:
        """Returns the schedule for a number of micro-batches.

        Args:
            num_microbatches: number of micro-batches in one step.
            name: another schedule than that of the module.

        Raises:
            ValueError: that schedule has other stages on the ranks than the module was divided for.
        """
        name = name or self.schedule_name
        chunks = self.chunks if name == "interleaved" else None
        if placement(name, self.num_stages, chunks) != self.rank_of_stage:
            raise ValueError(
                f"schedule {name!r} places {placement(name, self.num_stages, chunks)} stages on the ranks, but the "
                f"model was divided for {self.schedule_name!r} ({self.rank_of_stage}): pass "
                f"PipelineModule(schedule={name!r})"
            )
        return make(name, self.num_stages, num_microbatches, chunks=chunks)

    def recompute_every(self, interval: int) -> None:
        """Sets `activation_checkpoint_interval`, before a `Pipeline` is made."""
        self._recompute.set_interval(interval)

    def stage(
        self, index: int, shardable: Shardable | None = None, around: Callable[[], Around] = nullcontext
    ) -> Stage:
        """Returns a stage of this rank for an executor."""
        last = index == len(self.rank_of_stage) - 1
        # A recomputing checkpoint would run once for each part of a split backward.
        options = StageOptions(split_backward=not self._recompute.interval, around=around)
        return Stage(
            self.stage_module(index),
            index,
            loss_fn=self.loss_fn if last else None,
            shardable=shardable,
            options=options,
        )

    def stage_module(self, index: int) -> StageLayers:
        """Returns the module that computes a stage of this rank; `fully_shard` can be applied to it."""
        stage = self._stage_modules[index]
        stage.take_layers(self, index)
        return stage

    def refine_topology(self, topology: ProcessTopology) -> None:
        """Divides the data-parallel ranks of each stage further, before process groups are made: those that share the
        layers of a stage (tensor parallelism) are an axis `model` then.

        Raises:
            ValueError: another number of ranks or stages, or another stage on some rank.
        """
        here = self.process_topology
        stages = [_stages_of(t) for t in (here, _topology(None, topology))]
        if stages[0] != stages[1]:
            raise ValueError(
                f"{topology} puts the stages {stages[1]} on the ranks, and the layers of this model were divided for "
                f"{stages[0]}: pass PipelineModule(topology=...)"
            )
        self.process_topology = topology

    def run_stage(self, index: int, value: Any) -> Any:
        """Computes the layers of one stage."""
        start, end = self.parts[index], self.parts[index + 1]
        functions = [self._function(i) for i in range(start, end)]
        modules = [self._module_of(i) for i in range(start, end)]
        return self._recompute.run(functions, modules, value)

    def forward(self, value: Any) -> Any:
        """Computes all layers, if this rank has all of them.

        Raises:
            RuntimeError: other ranks have some of the stages.
        """
        if len(self.local_stages) != len(self.rank_of_stage):
            raise RuntimeError(
                f"this rank has the stages {self.local_stages} of {len(self.rank_of_stage)}: train with Pipeline"
            )
        for stage in self.local_stages:
            value = self.run_stage(stage, value)
        return value

    def local_layers(self) -> Mapping[int, nn.Module]:
        """Returns the modules of this rank by their index in the list of layers; a tied one at each of its indices,
        also at those of other ranks.
        """
        modules: dict[int, nn.Module] = {}
        for i, spec in enumerate(self._specs):
            tied = isinstance(spec, TiedLayerSpec)
            module = self.tied_modules._modules.get(spec.key) if tied else self._modules.get(str(i))
            if module is not None:
                modules[i] = module
        return modules

    def tied_parameters(self) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
        """Iterates over the shared parameters of this rank: (name, pipeline ranks that have it, parameter).

        All parameters of a tied layer are shared, as they are if all its places are on one rank.
        """
        for key, ranks in self._tied_ranks().items():
            if key in self.tied_modules:
                for name, param in self.tied_modules[key].named_parameters():
                    yield f"tied_modules.{key}.{name}", ranks, param

    def tie_groups(self) -> list[tuple[int, ...]]:
        """Returns the pipeline ranks of each tie that spans several, the same on all ranks."""
        return sorted({ranks for ranks in self._tied_ranks().values() if len(ranks) > 1})

    def _tied_ranks(self) -> Mapping[str, tuple[int, ...]]:
        ranks: dict[str, set[int]] = {}
        for stage, rank in enumerate(self.rank_of_stage):
            for i in range(self.parts[stage], self.parts[stage + 1]):
                if isinstance(spec := self._specs[i], TiedLayerSpec):
                    ranks.setdefault(spec.key, set()).add(rank)
        return {key: tuple(sorted(found)) for key, found in sorted(ranks.items())}

    def _build(self, stage: int) -> None:
        for index in range(self.parts[stage], self.parts[stage + 1]):
            layer = self._specs[index]
            if self._seed is not None:
                self._seed(index)
            if isinstance(layer, TiedLayerSpec):
                if layer.key not in self.tied_modules:
                    self.tied_modules[layer.key] = layer.build()
            elif isinstance(layer, (LayerSpec, nn.Module)):
                self.add_module(str(index), layer.build() if isinstance(layer, LayerSpec) else layer)
            elif not callable(layer):
                raise TypeError(
                    f"layer {index} is a {type(layer).__name__}: neither a LayerSpec nor callable"
                )

    def _function(self, index: int) -> Callable[[Any], Any]:
        """What computes a layer. Modules are looked up, since what cuts a model may have replaced them."""
        spec, module = self._specs[index], self._module_of(index)
        if module is None:
            plain: Callable[[Any], Any] = spec
            return plain
        if isinstance(spec, TiedLayerSpec) and spec.forward_fn is not None:
            return partial(spec.forward_fn, module)
        return module

    def _module_of(self, index: int) -> nn.Module | None:
        spec = self._specs[index]
        if isinstance(spec, TiedLayerSpec):
            return self.tied_modules[spec.key]
        return self._modules.get(str(index))


class StageLayers(nn.Module):
    """The layers of one stage as a module: parameters are those of the `PipelineModule`, under the same names."""

    def __init__(self, owner: PipelineModule, index: int) -> None:
        """`PipelineModule` makes it."""
        super().__init__()
        self._run = partial(owner.run_stage, index)
        self.take_layers(owner, index)

    def take_layers(self, owner: PipelineModule, index: int) -> None:
        """Registers the layers of the owner, which may have been replaced."""
        for i in range(owner.parts[index], owner.parts[index + 1]):
            module = owner._modules.get(str(i))
            if module is not None:
                self.add_module(str(i), module)

    def forward(self, value: Any) -> Any:
        """Computes the layers."""
        return self._run(value)


class _Recompute:
    """Activation checkpointing of every so many layers."""

    def __init__(self, interval: int, function: CheckpointFn, class_names: Sequence[str] | None) -> None:
        self.set_interval(interval)
        self._function = function
        self._class_names = None if class_names is None else frozenset(class_names)

    def set_interval(self, interval: int) -> None:
        if interval < 0:
            raise ValueError(
                f"activation_checkpoint_interval={interval}: 0 keeps activations, n recomputes n layers"
            )
        self.interval = interval

    def run(
        self, functions: Sequence[Callable[[Any], Any]], modules: Sequence[nn.Module | None], value: Any
    ) -> Any:
        size = self.interval or max(1, len(functions))
        for start in range(0, len(functions), size):
            part = functions[start : start + size]
            if self.interval and torch.is_grad_enabled() and self._applies(modules[start : start + size]):
                value = self._function(partial(_chained, part), value)
            else:
                value = _chained(part, value)
        return value

    def _applies(self, modules: Sequence[nn.Module | None]) -> bool:
        if self._class_names is not None:
            return all(type(module).__name__ in self._class_names for module in modules)
        return any(module is not None and any(True for _ in module.parameters()) for module in modules)


def _chained(functions: Sequence[Callable[[Any], Any]], value: Any) -> Any:
    for function in functions:
        value = function(value)
    return value


def _refuse_repeated(layers: Sequence[Layer], parts: Sequence[int], rank_of_stage: Sequence[int]) -> None:
    """Raises ValueError for a module that is in the list twice, on different ranks, which would train copies of it."""
    rank_of_layer = [rank for i, rank in enumerate(rank_of_stage) for _ in range(parts[i], parts[i + 1])]
    first: dict[int, int] = {}
    for index, layer in enumerate(layers):
        if isinstance(layer, nn.Module) and any(True for _ in layer.parameters()):
            before = first.setdefault(id(layer), index)
            if rank_of_layer[before] != rank_of_layer[index]:
                raise ValueError(
                    f"layers {before} and {index} are the same {type(layer).__name__}, but on the pipeline ranks "
                    f"{rank_of_layer[before]} and {rank_of_layer[index]}, each of which would train a copy of its own: "
                    "use TiedLayerSpec for both"
                )


def _seeded(seed_fn: Callable[[int], Any], base_seed: int, index: int) -> None:
    seed_fn(base_seed + index)


def _topology(num_stages: int | None, topology: ProcessTopology | None) -> ProcessTopology:
    world = dist.get_world_size() if dist.is_initialized() else 1
    if topology is None:
        if num_stages is None:
            raise ValueError("PipelineModule needs num_stages or topology")
        if num_stages < 1 or world % num_stages:
            raise ValueError(f"num_stages={num_stages} does not divide the {world} ranks of this job")
        return PipeDataParallelTopology(num_stages, world // num_stages)
    if topology.world_size() != world or not topology.get_dim("pipe"):
        raise ValueError(f"{topology} has no axis 'pipe', or not the {world} ranks of this job")
    if num_stages not in (None, topology.get_dim("pipe")):
        raise ValueError(f"num_stages={num_stages} contradicts {topology}")
    return topology


def _stages_of(topology: ProcessTopology) -> list[int]:
    """The stage of each rank."""
    return [getattr(topology.get_coord(rank), "pipe") for rank in range(topology.world_size())]  # noqa: B009


def _bounds(layers: Sequence[Layer], method: str | Sequence[int] | LayerProfile, num_parts: int) -> list[int]:
    if isinstance(method, LayerProfile):
        if len(method.seconds) != len(layers):
            raise ValueError(f"the profile has {len(method.seconds)} layers, the model {len(layers)}")
        return balanced(method.seconds, num_parts, sizes=method.parameter_bytes, limit=method.limit_bytes)
    if not isinstance(method, str):
        bounds = list(method)
        if (
            bounds != sorted(bounds)
            or bounds[:1] != [0]
            or bounds[-1] != len(layers)
            or len(bounds) != num_parts + 1
        ):
            raise ValueError(
                f"partition_method={bounds}: bounds of {num_parts} stages are {num_parts + 1} ascending numbers from 0 "
                f"to {len(layers)}"
            )
        return bounds
    name = method.lower()
    if name == "uniform":
        return uniform(len(layers), num_parts)
    if name == "parameters":
        return balanced([_trainable(layer) for layer in layers], num_parts)
    if name.startswith("type:"):
        pattern = re.compile(method[len("type:") :], re.IGNORECASE)
        matches = [float(bool(pattern.search(_class_name(layer)))) for layer in layers]
        if not any(matches):
            raise ValueError(f"partition_method={method!r}: no layer matches")
        return balanced(matches, num_parts)
    if name == "profile":
        raise ValueError("partition_method='profile' needs measurements: pass profile_layers(layers, sample)")
    raise ValueError(
        f"partition_method={method!r} is none of 'uniform', 'parameters', 'type:REGEX', bounds, or profile_layers(...)"
    )


def _class_name(layer: Layer) -> str:
    if isinstance(layer, LayerSpec):
        return layer.name
    return type(layer).__name__ if isinstance(layer, nn.Module) else getattr(layer, "__name__", "")


def _trainable(layer: Layer) -> float:
    """Number of trainable parameters, without memory for them."""
    if isinstance(layer, LayerSpec):
        with torch.random.fork_rng(devices=()), torch.device("meta"):
            layer = layer.build()
    params = layer.parameters() if isinstance(layer, nn.Module) else ()
    return float(sum(p.numel() for p in params if p.requires_grad))
