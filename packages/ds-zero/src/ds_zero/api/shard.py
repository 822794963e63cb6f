"""`shard`: shards a model and its optimizer, in place."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar, overload

import torch
from torch import nn
from torch.optim import Optimizer

from ds_zero import _registry
from ds_zero.api.assembly import ShardJob, assemble, attach, install
from ds_zero.api.bucket_plan import plan_layouts
from ds_zero.api.job_description import optimizer_description, require_same_job
from ds_zero.checks import (
    check_coverage,
    check_model,
    check_optimizer,
    check_stage,
    check_states_in_memory,
)
from ds_zero.comm.abort import AbortFlag
from ds_zero.comm.agreement import gathered_flags, gathered_values, require_same
from ds_zero.comm.collectives import Comm, comm_of
from ds_zero.comm.logged import logged
from ds_zero.comm.ranks import Group, Ranks, with_transport
from ds_zero.comm.thread_claim import GroupClaims
from ds_zero.comm.topology import MeshFor, ModelParallel, Topology, numbered, topology_of
from ds_zero.config import ZeroConfig
from ds_zero.interfaces import CollectiveSet, Norms, Reservation, ShardStore, ShardStoreError
from ds_zero.layout.optimizer_layout import undivided_groups
from ds_zero.layout.units import choose_leaves, choose_units, unit_of_params
from ds_zero.params.deferred import materialize_buffers, stage_expected
from ds_zero.params.stores import ResidentStore
from ds_zero.runtime.gathering.unit_map import map_units
from ds_zero.runtime.gradients.norms import squared_norm
from ds_zero.runtime.gradients.sparse_rows import row_parameters
from ds_zero.runtime.materialize import (
    OptimizerEntries,
    SecondaryGroup,
    broadcast_buffers,
    build,
    check_fused_if_away,
    near_ranks,
    reservations,
)
from ds_zero.runtime.optimizer_states import splits_masters
from ds_zero.runtime.storage import Reserved
from ds_zero.state import ZeroState

_log = logging.getLogger("ds_zero")

M = TypeVar("M", bound=nn.Module)
O = TypeVar("O", bound=Optimizer)  # noqa: E741


@overload
def shard(
    model: M,
    optimizer: None = None,
    stage: int = 2,
    mesh: Group | Ranks | None = None,
    config: ZeroConfig | None = None,
    store: ShardStore | None = None,
    comm: Comm | CollectiveSet | None = None,
    *,
    norms: Norms = squared_norm,
    mesh_for: MeshFor | None = None,
    model_parallel: ModelParallel | Group | None = None,
) -> M: ...


@overload
def shard(
    model: M,
    optimizer: O,
    stage: int = 2,
    mesh: Group | Ranks | None = None,
    config: ZeroConfig | None = None,
    store: ShardStore | None = None,
    comm: Comm | CollectiveSet | None = None,
    *,
    norms: Norms = squared_norm,
    mesh_for: MeshFor | None = None,
    model_parallel: ModelParallel | Group | None = None,
) -> tuple[M, O]: ...


def shard(
    model: M,
    optimizer: O | None = None,
    stage: int = 2,
    mesh: Group | Ranks | None = None,
    config: ZeroConfig | None = None,
    store: ShardStore | None = None,
    comm: Comm | CollectiveSet | None = None,
    *,
    norms: Norms = squared_norm,
    mesh_for: MeshFor | None = None,
    model_parallel: ModelParallel | Group | None = None,
) -> M | tuple[M, O]:
    """Shards optimizer states (stage 1), gradients (stage 2) and parameters (stage 3) among data-parallel ranks.
    Stage 0 divides nothing.

    The same objects are changed and returned. The loop stays the same, except that `ds_zero.clip_grad_norm_` replaces
    torch's. Every entry of `optimizer.param_groups[g]["params"]` becomes a 1-D fp32 shard, whose `.grad` is the mean
    over ranks. All ranks get rank 0's values.
    Collective: all ranks of `mesh` (default: all ranks of the process group, or this process alone) must call it with
    the same arguments, which is checked.

    Args:
        optimizer: an optimizer over parameters of `model`. If None, make the optimizer afterwards over
            `model.parameters()`, and pass it to `shard_optimizer` before the first step.
        mesh: the data axis: ranks with the same parameters and different data. With two axes (replicate, shard),
            buckets are sharded within a row, and rows are replicas. A process group is also accepted.
        store: where shards are stored. Default: on the device of the model.
        comm: the collectives, such as `ds_comm.collectives()`, with which ranks on one machine read each other's memory
            instead of sending messages. Default: direct and ordered on the CPU, the backend's on other devices.
        norms: computes squared norms for clipping. Default: torch, in fp64 blocks.
        mesh_for: returns another data axis for some parameters: experts, of which only some ranks hold the same.
            Their gradients are summed over their own ranks, and divided by the size of the model's axis. A weight that
            is tied over pipeline stages gets the data ranks of all of these.
        model_parallel: the model-parallel ranks; norms and overflow are shared among them.

    Returns:
        `(model, optimizer)`; only `model` if no optimizer was given.

    Raises:
        ValueError: an invalid stage or mesh, an optimizer that cannot work on shards, different parameters that share
            memory, or a model that is sharded already; on every rank, if ranks have different models, optimizers or
            arguments.

    Source: Rajbhandari et al., ZeRO (SC 2020), sections 5 and 7.
    """
    config = config or ZeroConfig()
    check_stage(stage)
    check_model(model)
    if optimizer is not None:
        check_optimizer(optimizer, model)
        if config.checksums:
            check_states_in_memory(optimizer)
    params = dict(model.named_parameters())
    device = _device(params)
    expected = stage_expected(params)
    if expected is not None and expected != stage:
        raise ValueError(
            f"the model was constructed under deferred_init(stage={expected}) and is sharded with "
            f"stage={stage}"
        )
    topology = topology_of(params, mesh, mesh_for, model_parallel)
    store = store or ResidentStore()
    ordered = True if config.rank_invariant else config.ordered_reduction
    comm = logged(comm_of(comm, device, ordered=ordered), comm)
    if comm.frozen is not None and stage == 3:
        store = comm.frozen.stored_in(store)
    parts = {"store": type(store).__qualname__, "comm": comm.description}
    # Checked before the first message whose size or order depends on it.
    require_same_job(params, optimizer, stage, config, parts, topology.axes[0], device)
    abort = AbortFlag()
    topology = numbered(topology, device)
    topology = _with_transports(topology, comm, device, abort)
    job = ShardJob(
        stage=stage,
        config=config,
        topology=topology,
        device=device,
        comm=comm,
        store=store,
        norms=norms,
        abort=abort,
    )
    claims = GroupClaims(topology.axes, "ds_zero.shard")
    state = _materialize(model, params, optimizer, job)
    state.handles.append(claims)
    install(model, state)
    if optimizer is None:
        return model
    attach(optimizer, state)
    return model, optimizer


def _with_transports(topology: Topology, comm: Comm, device: torch.device, abort: AbortFlag) -> Topology:
    if comm.connect is not None:
        return replace(
            topology, axes=tuple(with_transport(a, device, comm.connect, abort) for a in topology.axes)
        )
    if device.type == "cpu" and topology.axes[0].size > 1 and topology.axes[0].first:
        _log.info(
            "ds_zero.shard: ranks on one machine send messages to each other. With comm=ds_comm.collectives() (package "
            "ds-comm) they read each other's memory instead, if the system permits it"
        )
    return topology


def shard_optimizer(model: nn.Module, optimizer: O) -> O:
    """Replaces the parameters of an optimizer that was made after `shard(model, ...)` by their shards.

    For FSDP2's order: `ds_zero.shard(model, stage=3)`, `optimizer = AdamW(model.parameters())`,
    `ds_zero.shard_optimizer(model, optimizer)`. The same object is changed and returned. Buckets do not follow the
    optimizer's groups; pass the optimizer to `shard` if each group must be contiguous. Collective.

    Raises:
        ValueError: the model has an optimizer already; the optimizer leaves out parameters which require a gradient;
            it needs whole tensors, but the model was sharded without `ZeroConfig(layout="whole")`; on every rank, if
            ranks have different optimizers.
    """
    state = _registry.state_of(model)
    if state.optimizer is not None:
        raise ValueError(
            "this model has an optimizer already: call ds_zero.destroy(model) first, then shard it with the "
            "other optimizer"
        )
    params = dict(model.named_parameters())
    check_optimizer(optimizer, model)
    if state.config.checksums:
        check_states_in_memory(optimizer)
    check_fused_if_away(optimizer, [key for b in state.buckets for key in b.storage.away], state.store)
    check_coverage(optimizer, [p for b in state.buckets if b.trainable for p in b.params], params)
    needs_whole = any(undivided_groups(optimizer, state.config.layout, state.stage)) and state.stage > 0
    if needs_whole and not all(b.layout.undivided for b in state.buckets if b.trainable):
        raise ValueError(
            f"{type(optimizer).__name__} needs whole tensors, and the model was sharded for an element-wise optimizer: "
            'call ds_zero.shard(model, ..., config=ZeroConfig(layout="whole")), or pass the optimizer to ds_zero.shard'
        )
    require_same(
        "ds_zero.shard_optimizer",
        optimizer_description(params, optimizer),
        state.ranks,
        state.buckets[0].device,
        "Give every rank the same optimizer",
    )
    entries = OptimizerEntries(optimizer)
    for bucket in state.buckets:
        entries.replace(bucket)
    attach(optimizer, state)
    return optimizer


def _materialize(
    model: nn.Module, params: dict[str, nn.Parameter], optimizer: Optimizer | None, job: ShardJob
) -> ZeroState:
    """Plans the buckets, moves the model's values into them, and constructs the objects that work on them."""
    config, topology = job.config, job.topology
    materialize_buffers(model, job.device)
    if optimizer is not None:
        groups = [list(group["params"]) for group in optimizer.param_groups]
        undivided = undivided_groups(optimizer, config.layout, job.stage)
    else:
        groups, undivided = [[p for p in params.values() if p.requires_grad]], [config.layout == "whole"]
    leaves = choose_leaves(model, config.leaf_modules, config.module_granularity_numel, _registry.is_leaf)
    roots = choose_units(model, leaves)
    unit_of = unit_of_params(model, roots) if job.stage == 3 else {}
    rows = row_parameters(model, job.stage, topology) if config.sparse_gradients else frozenset()
    layouts = plan_layouts(groups, params, job.stage, config, topology, undivided, unit_of, rows)
    broadcast_buffers(model, topology.axes[0])
    splits = splits_masters(optimizer)
    plan = reservations(
        layouts, topology.axes, config.grad_dtype, job.device, split_masters=splits is not None
    )
    reserved = _reserved_everywhere(job, plan)
    if optimizer is not None:
        check_fused_if_away(optimizer, reserved.away, job.store)
    near = near_ranks(layouts, topology.axes, config.secondary_ranks)
    if job.comm.connect is not None:
        near = {axis: with_transport(n, job.device, job.comm.connect, job.abort) for axis, n in near.items()}
    enter: dict[str, Any] = {} if optimizer is None else {"built": OptimizerEntries(optimizer).replace}
    buckets = build(layouts, params, topology, reserved, config.grad_dtype, near, splits=splits, **enter)
    state = assemble(model, buckets, map_units(model, roots, buckets, leaves), job)
    state.handles += [SecondaryGroup(ranks, buckets) for ranks in near.values()]
    return state


def _reserved_everywhere(job: ShardJob, plan: Sequence[Reservation]) -> Reserved:
    """Reserves the tensors of this rank. Collective, if the store may have no room for them.

    Raises:
        ShardStoreError: the store of another rank has none. On that rank, its own error is raised.
    """
    if isinstance(job.store, ResidentStore):
        return Reserved(job.store, plan, job.device)
    error: Exception | None = None
    reserved: Reserved | None = None
    try:
        reserved = Reserved(job.store, plan, job.device)
    except (OSError, RuntimeError, MemoryError, ValueError) as own:
        error = own
    ranks = job.topology.axes[0]
    failed = any(gathered_flags(error is not None, ranks, job.device))
    if not failed:
        assert reserved is not None
        return reserved
    said = gathered_values(f"{type(error).__name__}: {error}" if error is not None else "", ranks.axes)
    if error is not None:
        raise error
    rank, text = next((rank, text) for rank, text in enumerate(said) if text)
    raise ShardStoreError(f"rank {rank} could not reserve memory or space on its disk: {text}")


def _device(params: dict[str, nn.Parameter]) -> torch.device:
    devices = {p.device for p in params.values() if p.device.type != "meta"}
    if len(devices) > 1:
        raise ValueError(
            f"the model's parameters are on {sorted(map(str, devices))}: move the whole model to one device "
            "first"
        )
    return devices.pop() if devices else torch.get_default_device()
