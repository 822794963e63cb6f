"""`shard`: turn a model and its optimizer into their sharded selves, in place."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from ds_zero import _registry
from ds_zero.backward import BackwardWatch
from ds_zero.bucket import Bucket, BucketState
from ds_zero.check import check_model, check_optimizer, check_stage
from ds_zero.comm import Comm, default_comm
from ds_zero.config import ZeroConfig
from ds_zero.deferred import become_real, materialize_buffers, recorded_values, stage_expected
from ds_zero.gather import Gatherer
from ds_zero.guard import guard_state_dicts
from ds_zero.hooks import ModuleHooks
from ds_zero.interfaces import Norms, Reservation, ShardKey, ShardStore
from ds_zero.layout import (
    FROZEN,
    BucketLayout,
    ParamInfo,
    default_bucket_numel,
    default_persistence_numel,
    keep_small_whole,
    plan_buckets,
)
from ds_zero.norms import squared_norm
from ds_zero.ranks import Ranks, ranks_of
from ds_zero.reduce import Reducer
from ds_zero.state import ZeroState
from ds_zero.step import Stepper
from ds_zero.store import ResidentStore
from ds_zero.units import choose_units, unit_of_params

M = TypeVar("M", bound=nn.Module)
O = TypeVar("O", bound=Optimizer)  # noqa: E741


def shard(
    model: M,
    optimizer: O,
    stage: int = 2,
    mesh: DeviceMesh | None = None,
    config: ZeroConfig | None = None,
    store: ShardStore | None = None,
    comm: Comm | None = None,
    *,
    norms: Norms = squared_norm,
) -> tuple[M, O]:
    """Divide optimizer states (stage 1), gradients (2) and parameters (3) among data-parallel ranks; stage 0
    divides nothing.

    The same objects are returned. The loop stays as it was, except that `ds_zero.clip_grad_norm_` replaces
    torch's; every entry of `optimizer.param_groups[g]["params"]` becomes a 1-D fp32 shard whose `.grad` is
    the mean over ranks. Rank 0's values win.
    Collective: all ranks of `mesh` (default: all ranks of the process group, or this process alone) call it
    alike.

    Args:
        store: where shards rest; default beside the model.
        comm: the collectives; default direct and ordered on the CPU, the backend's elsewhere.
        norms: squared norms for clipping; default torch in fp64 blocks.

    Raises:
        ValueError: an impossible stage or mesh, an optimizer that cannot work on shards, tensors that share
            memory without being one parameter, a model that is sharded already.

    Source: Rajbhandari et al., ZeRO (SC 2020), sections 5 and 7.
    """
    config = config or ZeroConfig()
    check_stage(stage)
    check_model(model)
    check_optimizer(optimizer, model, flat=stage > 0)
    ranks = ranks_of(mesh)
    store = store or ResidentStore()
    params = dict(model.named_parameters())
    device = _device(params)
    expected = stage_expected(params)
    if expected is not None and expected != stage:
        raise ValueError(
            f"the model was constructed under deferred_init(stage={expected}) and is sharded with "
            f"stage={stage}"
        )
    materialize_buffers(model, device)
    comm = comm or default_comm(device)
    layouts = _plan(model, optimizer, params, stage, config, ranks)

    _broadcast_buffers(model, ranks)
    buckets = _build(layouts, params, ranks, store, config.param_dtype, device)
    _hand_over(optimizer, buckets, ranks)

    state = _assemble(model, optimizer, buckets, stage, config, ranks, comm, store, norms)
    _registry.put(model, [*params.values(), optimizer], state)
    return model, optimizer


def _assemble(
    model: nn.Module,
    optimizer: Optimizer,
    buckets: list[Bucket],
    stage: int,
    config: ZeroConfig,
    ranks: Ranks,
    comm: Comm,
    store: ShardStore,
    norms: Norms,
) -> ZeroState:
    """Everything that acts on the buckets, and the hooks through which it is called."""
    watch = BackwardWatch()
    gatherer = Gatherer(buckets, comm, ranks)
    local = config.accumulation == "local" if config.accumulation else stage < 2
    reducer = Reducer(
        buckets,
        ranks=ranks,
        comm=comm,
        store=store,
        local_plan=local,
        steps=config.accumulation_steps,
        watch=watch,
    )
    stepper = Stepper(
        buckets, ranks=ranks, comm=comm, reducer=reducer, gatherer=gatherer, overlap=config.overlap_publish
    )
    # Listeners of the end of backward run in this order: reductions first, then gathered parameters go.
    hooks = ModuleHooks(gatherer, _buckets_of_modules(model, buckets), watch, config.prefetch)
    state = ZeroState(
        stage=stage,
        config=config,
        ranks=ranks,
        comm=comm,
        store=store,
        norms=norms,
        buckets=buckets,
        gatherer=gatherer,
        reducer=reducer,
        stepper=stepper,
        hooks=hooks,
        model=weakref.ref(model),
        optimizer=weakref.ref(optimizer),
        names=_names(model),
    )
    state.handles += reducer.install() + stepper.install(optimizer)
    state.handles += guard_state_dicts(model, state)
    if any(not b.whole for b in buckets):
        state.handles += hooks.install(model)
    state.handles.append(
        model.register_forward_pre_hook(_before_forward(weakref.ref(state), watch.check_abort))
    )
    return state


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


def _compute_dtype(param: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and param.is_floating_point() else param.dtype


def _plan(
    model: nn.Module,
    optimizer: Optimizer,
    params: dict[str, nn.Parameter],
    stage: int,
    config: ZeroConfig,
    ranks: Ranks,
) -> tuple[BucketLayout, ...]:
    """Describe the parameters to the pure planner. Frozen parameters outside the optimizer are divided in
    stage 3 only.
    """
    group_of = {id(p): g for g, group in enumerate(optimizer.param_groups) for p in group["params"]}
    unit_of = unit_of_params(model, choose_units(model)) if stage == 3 else {}
    infos = [
        ParamInfo(
            fqn=fqn,
            shape=tuple(p.shape),
            dtype=str(_compute_dtype(p, config.param_dtype)),
            group=group_of.get(id(p), FROZEN),
            unit=unit_of.get(fqn),
        )
        for fqn, p in params.items()
    ]
    if stage == 3:
        threshold = config.persistence_threshold_numel
        # A single number cannot be both gathered and protected against writes by its stride.
        infos = keep_small_whole(
            infos, max(1, default_persistence_numel(infos) if threshold is None else threshold)
        )
    bucket_numel = config.reduce_bucket_numel or default_bucket_numel(sum(p.numel for p in infos))
    return plan_buckets(infos, num_ranks=ranks.size, owners=stage > 0, bucket_numel=bucket_numel)


def _broadcast_buffers(model: nn.Module, ranks: Ranks) -> None:
    if ranks.group is None:
        return
    with torch.no_grad():
        for buffer in model.buffers():
            whole = buffer.contiguous()
            dist.broadcast(whole, group=ranks.group, group_src=0)
            if whole is not buffer:
                buffer.copy_(whole)


def _build(
    layouts: Sequence[BucketLayout],
    params: dict[str, nn.Parameter],
    ranks: Ranks,
    store: ShardStore,
    wanted: torch.dtype | None,
    device: torch.device,
) -> list[Bucket]:
    """Reserve resting memory, then move one bucket after the other, so that at most one exists twice."""
    reserved = store.reserve(_reservations(layouts, params, wanted, device))
    values = recorded_values(params)
    buckets = []
    for layout in layouts:
        members = [params[slot.fqn] for slot in layout.slots]
        initial = [values(slot.fqn, params[slot.fqn]) for slot in layout.slots]
        bucket = Bucket(layout, members, _compute_dtype(members[0], wanted), device)
        for param in members:
            become_real(param, device)
        _fill(bucket, initial, ranks, reserved)
        buckets.append(bucket)
    return buckets


def _reservations(
    layouts: Sequence[BucketLayout],
    params: dict[str, nn.Parameter],
    wanted: torch.dtype | None,
    device: torch.device,
) -> list[Reservation]:
    found: list[Reservation] = []
    for layout in layouts:
        dtype = _compute_dtype(params[layout.slots[0].fqn], wanted)
        kinds: list[tuple[str, torch.dtype]] = []
        master_is_param = dtype == torch.float32
        if layout.unit is not None and (layout.group == FROZEN or not master_is_param):
            kinds.append(("param", dtype))
        if layout.group != FROZEN:
            kinds.append(("grad", torch.float32))
            if not (master_is_param and layout.unit is None):
                kinds.append(("master", torch.float32))
        for kind, kind_dtype in kinds:
            found.append(
                Reservation(
                    key=ShardKey(name=layout.name, kind=kind),
                    partition=f"group{layout.group}.{kind}",
                    numel=layout.owned_numel,
                    dtype=kind_dtype,
                    device=device,
                )
            )
    # Grouped by kind, so that each partition is one run.
    return sorted(found, key=lambda r: r.partition)


def _fill(bucket: Bucket, values: list[Tensor], ranks: Ranks, reserved: Mapping[ShardKey, Tensor]) -> None:
    """Rank 0's values into master, low and full, cast once from what was given."""
    layout = bucket.layout
    begin, end = layout.owned_range(ranks.rank)
    exact = _flatten(values, layout, bucket.device)
    if ranks.group is not None:
        dist.broadcast(exact, group=ranks.group, group_src=0)
    with torch.no_grad():
        bucket.full.copy_(exact)
        if bucket.whole:
            bucket.low = bucket.full[begin:end]
        else:
            bucket.low = reserved.get(ShardKey(name=layout.name, kind="param"), bucket.low)
        if layout.group != FROZEN:
            bucket.grad = reserved.get(ShardKey(name=layout.name, kind="grad"))
            master = reserved.get(ShardKey(name=layout.name, kind="master"))
            if master is not None:
                master.copy_(exact[begin:end])
            bucket.master = bucket.low if master is None else master
            if not bucket.whole and bucket.dtype == torch.float32:
                bucket.low = bucket.master
        if not bucket.whole:
            bucket.low.copy_(exact[begin:end])
            bucket.show_holes()
            bucket.deflate()
            bucket.state = BucketState.SHARDED
        else:
            bucket.show_values()


def _flatten(values: list[Tensor], layout: BucketLayout, device: torch.device) -> Tensor:
    """Values side by side with gaps of zeros, in the dtype they were given in."""
    flat = torch.zeros(layout.padded_numel, dtype=values[0].dtype, device=device)
    for value, slot in zip(values, layout.slots, strict=True):
        flat[slot.offset : slot.end].copy_(value.reshape(-1))
    return flat


def _hand_over(optimizer: Optimizer, buckets: list[Bucket], ranks: Ranks) -> None:
    """Put shards where parameters were, with length and order kept, and cut existing optimizer state
    along.
    """
    shard_of: dict[int, tuple[Tensor, int, int, int]] = {}
    for bucket in buckets:
        if bucket.master is None:
            continue
        for param, (start, numel, offset) in zip(bucket.params, bucket.pieces(ranks.rank), strict=True):
            # detach: `data` of a view of a permanent buffer, so that in-place updates are seen by the
            # parameter but not by autograd.
            piece = bucket.master[offset : offset + numel].detach()
            piece.requires_grad_(param.requires_grad)
            bucket.shards.append(piece)
            shard_of[id(param)] = (piece, start, numel, param.numel())
    for group in optimizer.param_groups:
        entries = group["params"]
        for i, param in enumerate(entries):
            piece, start, numel, whole = shard_of[id(param)]
            entries[i] = piece
            state = optimizer.state.pop(param, None)
            if state:
                optimizer.state[piece] = {
                    k: v if k in _NUMBERS else _cut(v, param.shape, start, numel, whole)
                    for k, v in state.items()
                }


_NUMBERS = frozenset(["step", "eta", "mu", "mu_product"])
"""States of torch's optimizers that are one number a parameter; where the parameter is 0-dim, shapes do not
tell them from element-wise ones."""


def _cut(value: object, shape: torch.Size, start: int, numel: int, whole: int) -> object:
    if (
        isinstance(value, Tensor)
        and value.numel() == whole
        and (value.ndim > 0 or (not shape and value.is_floating_point()))
    ):
        return value.reshape(-1)[start : start + numel].clone()
    return value


def _buckets_of_modules(model: nn.Module, buckets: list[Bucket]) -> dict[str, list[Bucket]]:
    """Name -> stage-3 buckets to gather, for every unit and for every module with such parameters of its own.

    A unit also gathers what its modules share with others (a head tied to the embedding).
    """
    bucket_of = {id(p): b for b in buckets if not b.whole for p in b.params}
    if not bucket_of:
        return {}
    units = choose_units(model)
    found: dict[str, list[Bucket]] = {}
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) in bucket_of]
        if name in units:
            inside = [p for n, p in _params_of_unit(name, module, units)]
            own = [p for p in inside if id(p) in bucket_of]
        unique = {id(bucket_of[id(p)]): bucket_of[id(p)] for p in own}
        if unique:
            found[name] = list(unique.values())
    return found


def _params_of_unit(
    name: str, module: nn.Module, units: dict[str, nn.Module]
) -> list[tuple[str, nn.Parameter]]:
    """Parameters below `module` that no unit further inside has."""
    prefix = f"{name}." if name else ""
    inner = [u for u in units if u != name and u.startswith(prefix)]
    return [
        (n, p)
        for n, p in module.named_parameters(remove_duplicate=False)
        if not any(f"{prefix}{n}".startswith(f"{u}.") for u in inner)
    ]


def _before_forward(state: weakref.ref[ZeroState], check_abort: Callable[[], None]) -> Callable[..., None]:
    """What the model's own pre-hook does: published parameters arrive, and a broken backward is noticed."""

    def before(*_: object) -> None:
        found = state()
        if found is not None:
            check_abort()
            found.handles += found.reducer.install()
            found.stepper.wait()

    return before
