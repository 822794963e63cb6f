"""`shard`: turn a model and its optimizer into their sharded selves, in place."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from ds_zero import _registry
from ds_zero.checks import check_model, check_optimizer, check_stage
from ds_zero.comm.collectives import Comm, default_comm
from ds_zero.comm.peer_memory import AbortFlag
from ds_zero.comm.ranks import Group, Ranks, discover_peers
from ds_zero.comm.topology import MeshFor, ModelParallel, Topology, numbered, topology_of
from ds_zero.comm.watchdog import WatchedComm, note_steps, watch_ranks
from ds_zero.config import ZeroConfig
from ds_zero.interfaces import Norms, ShardStore
from ds_zero.layout.buckets import (
    FROZEN,
    BucketLayout,
    ParamInfo,
    default_bucket_numel,
    default_persistence_numel,
    keep_small_whole,
    plan_buckets,
)
from ds_zero.layout.optimizer_layout import undivided_groups
from ds_zero.layout.units import choose_leaves, choose_units, unit_of_params
from ds_zero.params.deferred import materialize_buffers, stage_expected
from ds_zero.params.state_dict_guard import guard_state_dicts, wait_in_modules
from ds_zero.params.stores import ResidentStore
from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.gathering.gather import Gatherer
from ds_zero.runtime.gathering.module_hooks import ModuleHooks
from ds_zero.runtime.gathering.prefetch import limits_of
from ds_zero.runtime.gathering.unit_gathering import UnitGathering
from ds_zero.runtime.gathering.unit_map import UnitMap, map_units
from ds_zero.runtime.gradients.backward import BackwardWatch
from ds_zero.runtime.gradients.grad_scale import ShardGrads
from ds_zero.runtime.gradients.norms import squared_norm
from ds_zero.runtime.gradients.reduce import Reducer
from ds_zero.runtime.gradients.reduce_bucket import WirePolicy
from ds_zero.runtime.gradients.reduce_policy import ReducePolicy
from ds_zero.runtime.gradients.sparse_rows import row_parameters
from ds_zero.runtime.materialize import add_secondary, broadcast_buffers, build, compute_dtype, hand_over
from ds_zero.runtime.step import Stepper
from ds_zero.runtime.uncompiled import opaque
from ds_zero.state import ZeroState

M = TypeVar("M", bound=nn.Module)
O = TypeVar("O", bound=Optimizer)  # noqa: E741


def shard(
    model: M,
    optimizer: O,
    stage: int = 2,
    mesh: Group | Ranks | None = None,
    config: ZeroConfig | None = None,
    store: ShardStore | None = None,
    comm: Comm | None = None,
    *,
    norms: Norms = squared_norm,
    mesh_for: MeshFor | None = None,
    model_parallel: ModelParallel | Group | None = None,
) -> tuple[M, O]:
    """Divide optimizer states (stage 1), gradients (2) and parameters (3) among data-parallel ranks; stage 0
    divides nothing.

    The same objects are returned. The loop stays as it was, except that `ds_zero.clip_grad_norm_` replaces
    torch's; every entry of `optimizer.param_groups[g]["params"]` becomes a 1-D fp32 shard whose `.grad` is
    the mean over ranks. Rank 0's values win.
    Collective: all ranks of `mesh` (default: all ranks of the process group, or this process alone) call it
    alike.

    Args:
        mesh: the data axis: ranks that hold the same parameters and see different data. With two axes
            (replicate, shard) buckets are divided inside a row only, and rows hold the same. A process group
            serves, too.
        store: where shards rest; default beside the model.
        comm: the collectives; default direct and ordered on the CPU, the backend's elsewhere.
        norms: squared norms for clipping; default torch in fp64 blocks.
        mesh_for: gives parameters another data axis than the model's: experts, which only some ranks hold alike.
            They are summed over their own ranks and divided by the size of the model's axis.
        model_parallel: the ranks among which the model itself is cut; norms and overflow are shared with them.

    Raises:
        ValueError: an impossible stage or mesh, an optimizer that cannot work on shards, tensors that share
            memory without being one parameter, a model that is sharded already.

    Source: Rajbhandari et al., ZeRO (SC 2020), sections 5 and 7.
    """
    config = config or ZeroConfig()
    check_stage(stage)
    check_model(model)
    check_optimizer(optimizer, model)
    undivided = undivided_groups(optimizer, config.layout, stage)
    params = dict(model.named_parameters())
    topology = topology_of(params, mesh, mesh_for, model_parallel)
    store = store or ResidentStore()
    device = _device(params)
    expected = stage_expected(params)
    if expected is not None and expected != stage:
        raise ValueError(
            f"the model was constructed under deferred_init(stage={expected}) and is sharded with "
            f"stage={stage}"
        )
    materialize_buffers(model, device)
    comm = comm or default_comm(device, ordered=True if config.rank_invariant else config.ordered_reduction)
    topology = numbered(topology, device)
    abort = AbortFlag()
    if config.read_neighbours:
        topology = replace(topology, axes=tuple(discover_peers(a, device, abort) for a in topology.axes))
    leaves = choose_leaves(model, config.leaf_modules, config.module_granularity_numel, _registry.is_leaf)
    roots = choose_units(model, leaves)
    unit_of = unit_of_params(model, roots) if stage == 3 else {}
    rows = row_parameters(model, stage, topology) if config.sparse_gradients else frozenset()
    layouts = _plan(optimizer, params, stage, config, topology, undivided, unit_of, rows)

    broadcast_buffers(model, topology.axes[0])
    buckets = build(layouts, params, topology, store, config.grad_dtype, device)
    hand_over(optimizer, buckets)
    groups = add_secondary(buckets, config.secondary_ranks, abort if config.read_neighbours else None)

    units = map_units(model, roots, buckets, leaves)
    state = _assemble(model, optimizer, buckets, units, stage, config, topology, comm, store, norms, abort)
    state.handles += groups
    _registry.put(model, [*params.values(), optimizer], state)
    return model, optimizer


def _assemble(
    model: nn.Module,
    optimizer: Optimizer,
    buckets: list[Bucket],
    units: UnitMap,
    stage: int,
    config: ZeroConfig,
    topology: Topology,
    comm: Comm,
    store: ShardStore,
    norms: Norms,
    abort: AbortFlag,
) -> ZeroState:
    """Everything that acts on the buckets, and the hooks through which it is called."""
    watch = BackwardWatch()
    waiting = watch_ranks(
        topology.axes[0], topology.axes[1:], config.order_timeout_s, abort, buckets[0].device
    )
    comm = WatchedComm(comm, waiting)
    gatherer = Gatherer(buckets, comm, waiting)
    reducer, stepper = _reducer_and_stepper(buckets, gatherer, comm, store, watch, config, stage)
    gathering = UnitGathering(gatherer, units, limits_of(config), waiting.log)
    hooks = ModuleHooks(gathering, units, watch)
    # Reductions come first: they may still read parameters that are gathered.
    watch.listen(
        at_end=[reducer.end_backward, gathering.end_backward], at_abort=[reducer.abort, gathering.abort]
    )
    state = ZeroState(
        stage=stage,
        config=config,
        ranks=topology.axes[0],
        comm=comm,
        store=store,
        norms=norms,
        norm_groups=topology.norm_groups,
        buckets=buckets,
        gatherer=gatherer,
        gathering=gathering,
        reducer=reducer,
        stepper=stepper,
        hooks=hooks,
        waiting=waiting,
        model=weakref.ref(model),
        optimizer=weakref.ref(optimizer),
        names=_names(model),
    )
    state.handles.append(note_steps(optimizer, waiting.log))
    state.handles += reducer.install() + stepper.install(optimizer)
    state.handles += guard_state_dicts(model, state)
    if config.overlap_publish:
        state.handles += wait_in_modules(model, state)
    if any(not b.whole for b in buckets):
        state.handles += hooks.install(model)
    state.handles.append(
        model.register_forward_pre_hook(_before_forward(weakref.ref(state), watch.check_abort))
    )
    state.handles.append(watch.install(model))
    return state


def _reducer_and_stepper(
    buckets: list[Bucket],
    gatherer: Gatherer,
    comm: Comm,
    store: ShardStore,
    watch: BackwardWatch,
    config: ZeroConfig,
    stage: int,
) -> tuple[Reducer, Stepper]:
    grads = ShardGrads(buckets)
    policy = _reduce_policy(config, stage)
    reducer = Reducer(buckets, comm, store, policy, watch, grads.begin_accumulation)
    stepper = Stepper(
        buckets,
        comm=comm,
        reducer=reducer,
        grads=grads,
        gatherer=gatherer,
        overlap=config.overlap_publish,
        publish_numel=config.publish_bucket_numel,
    )
    return reducer, stepper


def _reduce_policy(config: ZeroConfig, stage: int) -> ReducePolicy:
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
    return {found[0]: tuple(found) for found in names.values()}


def _device(params: dict[str, nn.Parameter]) -> torch.device:
    devices = {p.device for p in params.values() if p.device.type != "meta"}
    if len(devices) > 1:
        raise ValueError(
            f"the model's parameters are on {sorted(map(str, devices))}: move the whole model to one device "
            "first"
        )
    return devices.pop() if devices else torch.get_default_device()


def _plan(
    optimizer: Optimizer,
    params: dict[str, nn.Parameter],
    stage: int,
    config: ZeroConfig,
    topology: Topology,
    undivided: Sequence[bool],
    unit_of: Mapping[str, str],
    rows: frozenset[int],
) -> tuple[BucketLayout, ...]:
    """Describe the parameters to the pure planner; `unit_of` is empty below stage 3, `rows` without
    `sparse_gradients`. Frozen parameters outside the
    optimizer are divided in stage 3 only.
    """
    group_of = {id(p): g for g, group in enumerate(optimizer.param_groups) for p in group["params"]}
    infos = []
    for fqn, p in params.items():
        group = group_of.get(id(p), FROZEN)
        infos.append(
            ParamInfo(
                fqn=fqn,
                shape=tuple(p.shape),
                dtype=str(compute_dtype(fqn, p, config)),
                group=group,
                unit=unit_of.get(fqn),
                undivided=group != FROZEN and undivided[group],
                axis=topology.axis_of.get(fqn, 0),
                by_rows=group != FROZEN and id(p) in rows,
            )
        )
    if stage == 3:
        threshold = config.persistence_threshold_numel
        infos = keep_small_whole(
            infos,
            default_persistence_numel(infos) if threshold is None else threshold,
            config.model_persistence_numel,
        )
    bucket_numel = config.reduce_bucket_numel or default_bucket_numel(sum(p.numel for p in infos))
    counts = [ranks.size for ranks in topology.axes]
    return plan_buckets(infos, num_ranks=counts, owners=stage > 0, bucket_numel=bucket_numel)


def _before_forward(state: weakref.ref[ZeroState], check_abort: Callable[[], None]) -> Callable[..., None]:
    """What the model's own pre-hook does: published parameters arrive, and a broken backward is noticed."""

    @opaque
    def before(*_: object) -> None:
        found = state()
        if found is not None:
            check_abort()
            found.handles += found.reducer.install()
            found.stepper.wait()

    return before
