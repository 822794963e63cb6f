"""Assembles the objects that work on the buckets of a model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from ds_zero import _registry
from ds_zero.comm.abort import AbortFlag
from ds_zero.comm.collectives import Comm
from ds_zero.comm.topology import Topology
from ds_zero.comm.watchdog import note_steps, watch_ranks
from ds_zero.comm.watched import WatchedComm
from ds_zero.config import ZeroConfig
from ds_zero.interfaces import Norms, ShardStore
from ds_zero.params.optimizer_state_dict import guard_optimizer
from ds_zero.params.state_dict_guard import guard_state_dicts, wait_in_modules
from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.checksums import Checksums, NoChecksums
from ds_zero.runtime.early_step import EarlySteps, NoEarlySteps
from ds_zero.runtime.gathering.gather import Gatherer
from ds_zero.runtime.gathering.module_hooks import ModuleHooks
from ds_zero.runtime.gathering.prefetch import limits_of
from ds_zero.runtime.gathering.unit_gathering import UnitGathering
from ds_zero.runtime.gathering.unit_map import UnitMap
from ds_zero.runtime.gradients.arrived_norms import ArrivedNorms
from ds_zero.runtime.gradients.backward import BackwardWatch
from ds_zero.runtime.gradients.grad_scale import Pending, ShardGrads
from ds_zero.runtime.gradients.param_grads import ParamGrads
from ds_zero.runtime.gradients.reduce import Reducer
from ds_zero.runtime.gradients.reduce_bucket import WirePolicy
from ds_zero.runtime.gradients.reduce_policy import ReducePolicy
from ds_zero.runtime.optimizer_options import OptimizerOptions
from ds_zero.runtime.step import Stepper
from ds_zero.runtime.uncompiled import opaque
from ds_zero.state import ZeroState
from ds_zero.tensors.storage import is_fake


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """The arguments of `shard`, with all defaults resolved."""

    stage: int
    config: ZeroConfig
    topology: Topology
    device: torch.device
    comm: Comm
    store: ShardStore
    norms: Norms
    abort: AbortFlag
    """Ends waits for peer memory when a rank has died."""


def assemble(model: nn.Module, buckets: list[Bucket], units: UnitMap, job: ShardJob) -> ZeroState:
    """Constructs the objects that gather, reduce and step the buckets. `install` and `attach` add the hooks."""
    config, topology = job.config, job.topology
    watch = BackwardWatch()
    waiting = watch_ranks(topology.axes[0], topology.axes[1:], config.order_timeout_s, job.abort, job.device)
    comm = WatchedComm(job.comm, waiting)
    options = OptimizerOptions()
    gatherer = Gatherer(buckets, comm, waiting)
    grads, param_grads, norms = (
        ShardGrads(buckets),
        ParamGrads(buckets),
        ArrivedNorms(job.norms, in_memory=config.overlap_step),
    )
    early = early_steps(buckets, grads.pending, config)
    policy = reduce_policy(config, job.stage)
    checksums = checksums_of(buckets, topology, config)
    reducer = Reducer(
        buckets, comm, policy, watch, grads.begin_accumulation, param_grads, options, checksums, norms, early
    )
    stepper = Stepper(
        buckets,
        comm=comm,
        reducer=reducer,
        grads=grads,
        gatherer=gatherer,
        overlap=config.overlap_publish,
        publish_numel=config.publish_bucket_numel,
        checksums=checksums,
        early=early,
    )
    gathering = UnitGathering(gatherer, units, limits_of(config, loads=gatherer.loads), waiting.log)
    hooks = ModuleHooks(gathering, units, watch)
    watch.listen(
        at_begin=[param_grads.clear],
        # Reductions come first, because they may still read gathered parameters.
        at_end=[reducer.end_backward, gathering.end_backward, stepper.end_backward, param_grads.show],
        at_abort=[reducer.abort, gathering.abort],
    )
    return ZeroState(
        stage=job.stage,
        config=config,
        ranks=topology.axes[0],
        comm=comm,
        store=job.store,
        norms=norms,
        topology=topology,
        buckets=buckets,
        gatherer=gatherer,
        gathering=gathering,
        reducer=reducer,
        stepper=stepper,
        hooks=hooks,
        waiting=waiting,
        watch=watch,
        options=options,
        checksums=checksums,
        early=early,
        model=weakref.ref(model),
        optimizer=None,
        names=_names(model),
    )


def install(model: nn.Module, state: ZeroState) -> None:
    """Adds hooks to the model. Their order matters if a module gets several: gathering comes before the model's own
    pre-hook, which waits for updated parameters.
    """
    state.handles += state.reducer.install()
    state.handles += guard_state_dicts(model, state)
    if state.config.overlap_publish:
        state.handles += wait_in_modules(model, state)
    if any(not b.whole for b in state.buckets):
        state.handles += state.hooks.install(model)
    before = _before_forward(weakref.ref(state), state.watch.check_abort)
    state.handles.append(model.register_forward_pre_hook(before))
    state.handles.append(state.watch.install(model))
    _registry.put(model, [p for b in state.buckets for p in b.params], state)


def attach(optimizer: Optimizer, state: ZeroState) -> None:
    """Adds hooks to the optimizer, whose groups contain the shards of the buckets."""
    state.optimizer = weakref.ref(optimizer)
    state.options.follow(optimizer)
    state.handles.append(note_steps(optimizer, state.waiting.log))
    state.handles += state.stepper.install(optimizer)
    state.handles += guard_optimizer(optimizer, state)
    _registry.put_part(optimizer, state)
    state.checksums.attach(optimizer)
    state.early.attach(optimizer)


def checksums_of(buckets: Sequence[Bucket], topology: Topology, config: ZeroConfig) -> NoChecksums:
    """Returns the object that keeps checksums of shards, if `config` asks for it."""
    if not config.checksums or any(is_fake(b.full) for b in buckets):
        return NoChecksums()
    return Checksums(buckets, topology.norm_groups)


def early_steps(buckets: Sequence[Bucket], pending: Pending, config: ZeroConfig) -> NoEarlySteps:
    """Returns the object that steps buckets during the backward, if `config` asks for it."""
    trainable = [b for b in buckets if b.trainable and not is_fake(b.full)]
    if not config.overlap_step or not trainable:
        return NoEarlySteps()
    return EarlySteps(trainable, trainable[0].storage.reserved, pending, config.undo_bytes)


def reduce_policy(config: ZeroConfig, stage: int) -> ReducePolicy:
    """Returns when and how gradients are reduced, from `config` or the defaults of the stage."""
    plan = config.accumulation or ("local" if stage < 2 and not config.rank_invariant else "sharded")
    return ReducePolicy(
        reduction=plan,
        steps=config.accumulation_steps,
        tree=config.rank_invariant,
        overlap=config.overlap_reduce is not False,
        ignore_unused=config.ignore_unused,
        grad_dtype=config.grad_dtype,
        wire=WirePolicy(
            scatter=config.reduce_scatter,
            dtype=config.communication_dtype,
            mean=config.reduce_op == "mean",
            predivide=config.predivide_factor,
        ),
    )


def _names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    names: dict[int, list[str]] = {}
    for fqn, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(fqn)
    return {of_one[0]: tuple(of_one) for of_one in names.values()}


def _before_forward(state: weakref.ref[ZeroState], check_abort: Callable[[], None]) -> Callable[..., None]:
    """Returns the model's own pre-hook: it waits for updated parameters, detects a failed backward, and removes the
    handles in `param.grad` before torch.compile may trace them.
    """

    @opaque
    def before(*_: object) -> None:
        live = state()
        if live is not None:
            check_abort()
            live.handles += live.reducer.install()
            live.stepper.wait()
            live.reducer.param_grads.remove_for_compiler()

    return before
