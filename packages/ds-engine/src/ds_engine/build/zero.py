"""Translates a job to arguments of ds_zero, and implements the engine's protocols with ds_zero."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

import ds_zero
from ds_checkpoint.owners.names import tied
from ds_core.kernels import squared_norm
from ds_engine.build import moe, self_reducing
from ds_engine.build.layers import sparse_attention
from ds_engine.build.offload_states import send_away
from ds_engine.build.topology import Meshes
from ds_engine.config import ConfigError
from ds_engine.config.sections.zero.leaf_module import DEFAULT_CLASSES, LeafModuleConfig
from ds_engine.interfaces import KeepsErrors, LossGuard, MovedActivations, Reading, Roles, StateNames
from ds_engine.job import Job, LossScaling
from ds_engine.job.precision import DTYPES


def shard(
    job: Job,
    model: nn.Module,
    optimizer: Optimizer,
    meshes: Meshes,
    device: torch.device,
    comm: Any = None,
    store: Any = None,
) -> None:
    """Shards a model and its optimizer, in place. Collective.

    A model that was constructed under `ds_zero.deferred_init` is materialised here, on `device`.
    """
    moe.check_reduction(meshes, self_reducing.reduces(optimizer))
    deferred = any(p.is_meta for p in model.parameters())
    with device if deferred else contextlib.nullcontext():
        ds_zero.shard(
            model,
            optimizer,
            stage=job.stage,
            mesh=meshes.data,
            config=zero_config(job, model),
            store=store,
            comm=comm,
            norms=squared_norm,
            mesh_for=meshes.mesh_for,
            model_parallel=meshes.model_parallel,
        )
    moe.balance(model, optimizer, meshes)
    if self_reducing.reduces(optimizer):
        ds_zero.control(model).set_reduction("none")


def require_same(entries: Mapping[str, str], device: torch.device) -> None:
    """Compares the descriptions of a job over all ranks. Collective.

    Raises:
        ConfigError: on every rank, if the ranks differ; with each value and the ranks that have it.
    """
    remedy = "Call ds_engine.initialize() with the same model and settings on every rank"
    try:
        ds_zero.require_same("ds_engine.initialize", entries, None, device, remedy)
    except ValueError as error:
        raise ConfigError([str(error)]) from None


def gathered(own: Any, num_ranks: int, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Returns the objects that the `num_ranks` ranks of a group pass, in the order of ranks. Collective.

    Args:
        group: None: all ranks; for one rank there needs to be no process group.
    """
    every = [own] * num_ranks
    if num_ranks > 1:
        dist.all_gather_object(every, own, group)
    return every


def roles_of(
    job: Job,
    model: nn.Module,
    optimizer: Optimizer,
    activations: MovedActivations | None = None,
    meshes: Meshes | None = None,
    errors: KeepsErrors | None = None,
) -> Roles:
    """Returns the objects that own gradients and state of a sharded model.

    Args:
        errors: what its collectives keep between reductions; None: nothing.
    """
    if self_reducing.reduces(optimizer):
        guard = self_reducing.guard_of(optimizer, loss_scale_of(job.precision.loss_scaling)) or Unguarded()
        norms = self_reducing.norms_of(optimizer)
    else:
        guard, norms = guard_of(job, model), ZeroNorms(model)
    return Roles(
        guard=guard,
        norms=norms,
        state=ZeroState(model, optimizer, errors),
        activations=activations,
        sparse_attention=sparse_attention(job.settings.sparse_attention, model),
        tensor_group=meshes.tensor if meshes is not None else None,
        sequence_group=meshes.sequence if meshes is not None else None,
    )


def zero_config(job: Job, model: nn.Module) -> ds_zero.ZeroConfig:
    """Returns the `ZeroConfig` for `ds_zero.shard`.

    Args:
        model: the model in which the entries of `leaf_module` are looked up.

    Raises:
        ConfigError: an entry matches no module.
    """
    settings, zero = job.settings, job.settings.zero_optimization
    wire = settings.communication_data_type
    return ds_zero.ZeroConfig(
        accumulation=zero.accumulation_plan,
        rank_invariant=job.accumulating.rank_invariant,
        secondary_ranks=max(1, zero.zero_hpz_partition_size),
        accumulation_steps=_backwards(job),
        sparse_gradients=settings.sparse_gradients,
        param_dtype=job.precision.param_dtype,
        dtype_for=job.precision.dtype_for(model),
        grad_dtype=job.precision.grad_dtype,
        reduce_bucket_numel=_bucket_numel(job, model),
        overlap_reduce=zero.overlap_comm,
        reduce_scatter=zero.reduce_scatter,
        ignore_unused=zero.ignore_unused_parameters,
        communication_dtype=DTYPES[wire] if wire is not None else None,
        reduce_op=settings.gradient_allreduce_op,
        # Division before the sum is predivision by the number of ranks.
        predivide_factor=float(job.batch.ranks)
        if settings.prescale_gradients
        else settings.gradient_predivide_factor,
        publish_bucket_numel=zero.allgather_bucket_size,
        persistence_threshold_numel=zero.stage3_param_persistence_threshold,
        model_persistence_numel=zero.stage3_model_persistence_threshold,
        prefetch=zero.stage3_prefetch,
        prefetch_numel=zero.stage3_prefetch_bucket_size,
        max_live_numel=zero.stage3_max_live_parameters,
        max_reuse_distance_numel=zero.stage3_max_reuse_distance,
        module_granularity_numel=zero.stage3_module_granularity_threshold or 0,
        leaf_modules=leaf_modules(zero.leaf_module, model) if job.stage == 3 else (),
        overlap_publish=zero.overlap_publish and job.stage in (1, 2),
        checksums=settings.integrity.checksums,
        overlap_step=zero.overlaps_step,
        undo_bytes=zero.offload_optimizer.undo_bytes,
    )


def _backwards(job: Job) -> int | None:
    """Returns `ZeroConfig.accumulation_steps`."""
    if job.pipeline is not None:
        return None  # the executor says which backward completes the gradients of a rank
    # If the caller decides about boundaries, no backward is known to be the last, so gradients are reduced in step().
    return job.batch.steps if job.accumulating.managed else sys.maxsize


_STAGED_NUMEL = 16 * 2**20
"""Maximum number of elements of a bucket whose masters are on a disk: three of them are in memory at a time."""
_DIVIDED_AMONG_TIERS = 32
"""Minimum number of buckets if a fraction of them is offloaded: the fraction is a number of whole buckets."""


def _bucket_numel(job: Job, model: nn.Module) -> int | None:
    """Returns `ZeroConfig.reduce_bucket_numel`."""
    limits = [job.settings.zero_optimization.reduce_bucket_size]
    if job.placement.masters == "nvme" or job.placement.by_budget:
        limits.append(_STAGED_NUMEL)
    if job.placement.ratio < 1.0 or job.placement.by_budget:
        numel = sum(p.numel() for p in model.parameters() if p.requires_grad)
        limits.append(max(1, numel // _DIVIDED_AMONG_TIERS))
    return min((limit for limit in limits if limit is not None), default=None)


def leaf_modules(section: LeafModuleConfig, model: nn.Module) -> tuple[str, ...]:
    """Returns the names of the modules that stage 3 gathers as a whole.

    Raises:
        ConfigError: no module has a given name, suffix or class. The default classes are exempt, since most models
            lack them.
    """
    modules = dict(model.named_modules())
    chosen: set[str] = set()
    missing: list[str] = []

    def take(key: str, wanted: Iterable[str], fits: Callable[[str, str], bool]) -> None:
        for text in wanted:
            names = {name for name in modules if fits(text, name)}
            if not names and not (key == "classes" and text in DEFAULT_CLASSES):
                missing.append(f"zero_optimization.leaf_module.{key}: the model has no {text!r}")
            chosen.update(names)

    take("classes", section.classes, lambda text, name: text in _class_names(type(modules[name])))
    take("names", section.names, lambda text, name: text == name)
    take("name_suffixes", section.name_suffixes, lambda text, name: name.endswith(text))
    if missing:
        raise ConfigError(missing)
    return tuple(sorted(chosen))


def _class_names(kind: type) -> tuple[str, str]:
    return kind.__qualname__, f"{kind.__module__}.{kind.__qualname__}"


def loss_scale_of(scaling: LossScaling | None) -> float | ds_zero.DynamicScale | None:
    """Returns the argument of `ds_zero.LossScaler`; None: no loss scaling."""
    if scaling is None or not scaling.dynamic:
        return None if scaling is None else scaling.initial
    return ds_zero.DynamicScale(
        initial_scale=scaling.initial,
        window=scaling.window,
        hysteresis=scaling.hysteresis,
        consecutive_hysteresis=scaling.consecutive_hysteresis,
        min_scale=scaling.minimum,
        raise_at_min=scaling.raise_at_minimum,
    )


def guard_of(job: Job, model: nn.Module) -> LossGuard:
    """Returns the `LossGuard` of a sharded model."""
    scale = loss_scale_of(job.precision.loss_scaling)
    return Unguarded() if scale is None else ds_zero.LossScaler(model, scale)


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class Unguarded:
    """A `LossGuard` that neither scales losses nor skips updates."""

    loss_scale = 1.0
    step_was_skipped = False
    culprit: str | None = None

    def scale(self, loss: Tensor) -> Tensor:
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        return None


class ZeroNorms:
    """`GradientNorms` of a sharded model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def clip(self, max_norm: float) -> None:
        ds_zero.clip_grad_norm_(self._model, max_norm)

    def last(self) -> ds_zero.GradNorm | None:
        return ds_zero.grad_norm(self._model)


class ZeroState:
    """`ModelState` of a sharded model."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, errors: KeepsErrors | None = None) -> None:
        self._model, self._optimizer = model, optimizer
        self.errors = errors
        self._away: ds_zero.Away | None = None
        self.divided = is_divided(model)

    @property
    def backwards(self) -> int:
        return ds_zero.control(self._model).backwards

    def shares(self) -> ds_zero.Summary:
        return ds_zero.describe(self._model)

    def held(self) -> ds_zero.MemoryReport:
        return ds_zero.memory(self._model, self._optimizer)

    def records(self) -> Sequence[ds_zero.ShardRecord]:
        return ds_zero.records(self._model, self._optimizer)

    def check_replicas(self, step: int) -> None:
        if self_reducing.reduces(self._optimizer):
            return  # its states, and between two of its reductions the parameters, differ on purpose
        try:
            ds_zero.check_replicas(self._model)
        except ds_zero.ReplicaError as error:
            raise ds_zero.ReplicaError(f"before step {step}: {error}") from None

    def group_names(self) -> list[list[str]]:
        return ds_zero.group_names(self._model, self._optimizer)

    def names(self) -> StateNames:
        model = self._model
        persistent = set(model.state_dict(keep_vars=True))
        params = dict(model.named_parameters())
        return StateNames(
            tensors=frozenset({*params, *(n for n, _ in model.named_buffers() if n in persistent)}),
            frozen=tuple(name for name, p in params.items() if not p.requires_grad),
            tied=tied(model),
            groups=tuple(tuple(names) for names in self.group_names()),
        )

    def load_records(
        self,
        source: Any,
        *,
        optimizer_states: bool = True,
        keep: AbstractSet[str] = frozenset(),
        expect: Callable[[Sequence[Reading]], None] | None = None,
    ) -> None:
        ds_zero.load_records(
            self._model,
            self._optimizer,
            source,
            optimizer_states=optimizer_states,
            keep=keep,
            expect=expect,
        )

    def residuals(self) -> Mapping[str, Any] | None:
        if self.errors is None:
            return self_reducing.residuals_of(self._optimizer)
        return {"errors": dict(self.errors.state_dict()), "ranks": _num_ranks()}

    def load_residuals(self, states: Sequence[Mapping[str, Any]]) -> str | None:
        own = [state for state in states if "errors" in state]
        if self.errors is None:
            self_reducing.load_residuals(self._optimizer, [s for s in states if "errors" not in s])
            return None
        fits = len(own) == 1 and own[0]["ranks"] == _num_ranks()
        self.errors.load_state_dict(own[0]["errors"] if fits else {})
        if fits or not own:
            return None
        return f"they belong to ranks of {own[0]['ranks']}, and these are {_num_ranks()}"

    def offload(
        self, include: Collection[str] | None, device: str, *, pin_memory: bool, non_blocking: bool
    ) -> None:
        self.reload(non_blocking=False)
        self._away = send_away(self._model, include, device, pin_memory=pin_memory, non_blocking=non_blocking)

    def reload(self, *, non_blocking: bool) -> None:
        if self._away is not None:
            self._away.back(non_blocking=non_blocking)
            self._away = None

    def offloaded(self) -> frozenset[str]:
        return self._away.kinds if self._away is not None else frozenset()

    def destroy(self) -> None:
        if not is_sharded(
            self._model
        ):  # taken out of the engine already, for example to load a checkpoint into it
            return
        self.reload(non_blocking=False)
        ds_zero.destroy(self._model)


def is_sharded(model: nn.Module) -> bool:
    """Whether `ds_zero.shard` has the model's parameters, at any stage."""
    return any(ds_zero.presence(p) is not None for p in model.parameters())


def is_divided(model: nn.Module) -> bool:
    """Whether parameters are gathered while the model runs (stage 3)."""
    states = (ds_zero.presence(p) for p in model.parameters())
    return any(state is not None and state.divided for state in states)
