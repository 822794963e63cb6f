"""The memory of a rank between steps, computed from the layout without running the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from ds_zero import _registry
from ds_zero.api.bucket_plan import plan_layouts
from ds_zero.interfaces import Reservation, ShardKey, Tier
from ds_zero.layout.buckets import FROZEN, BucketLayout, piece_of
from ds_zero.layout.optimizer_layout import undivided_groups
from ds_zero.layout.units import choose_leaves, choose_units, unit_of_params
from ds_zero.predict import allocation_tracker
from ds_zero.predict.early_step_bytes import early_step_bytes
from ds_zero.predict.planned_comm import stored_items
from ds_zero.predict.report import StoredTensor
from ds_zero.predict.simulate import Job
from ds_zero.predict.tiers import STATE
from ds_zero.runtime.gradients.sparse_rows import row_parameters
from ds_zero.runtime.materialize import dtype_of, reservations
from ds_zero.runtime.optimizer_states import splits_masters
from ds_zero.runtime.staging import NUM_BUFFERS

_PURPOSE_OF_KIND: Mapping[str, str] = {
    "param": allocation_tracker.PARAMETERS,
    "master": allocation_tracker.MASTERS,
    "grad": allocation_tracker.GRADIENTS,
}


@dataclass(frozen=True)
class Resting:
    """Bytes between steps by purpose, on the device and in host memory, and the bytes on a disk."""

    device: Mapping[str, int]
    host: Mapping[str, int]
    disk_bytes: int
    kinds: Mapping[Tier, frozenset[str]]
    """The kinds of tensors that are in each tier; "state": the states of the optimizer."""
    tensors: tuple[StoredTensor, ...]
    """What a store places, and the states of each bucket."""


def resting_bytes(model: nn.Module, job: Job) -> Resting:
    """Returns the bytes of parameters, masters, gradients, states and buffers of rank 0 between steps, including
    padding.
    """
    given = job.optimizer if isinstance(job.optimizer, Optimizer) else job.optimizer(_trainable(model))
    params = dict(model.named_parameters())
    _, topology = job.topology(params)
    undivided = undivided_groups(given, job.config.layout, job.stage)
    leaves = choose_leaves(
        model, job.config.leaf_modules, job.config.module_granularity_numel, _registry.is_leaf
    )
    unit_of = unit_of_params(model, choose_units(model, leaves)) if job.stage == 3 else {}
    rows = row_parameters(model, job.stage, topology) if job.config.sparse_gradients else frozenset()
    groups = [list(group["params"]) for group in given.param_groups]
    layouts = plan_layouts(groups, params, job.stage, job.config, topology, undivided, unit_of, rows)
    in_fp32 = {x.name for x in layouts if x.unit is not None and dtype_of(x) == torch.float32}
    device, host = Counter[str](), Counter[str]()
    device[allocation_tracker.BUFFERS] = sum(b.numel() * b.element_size() for b in model.buffers())
    split = splits_masters(given) is not None
    cpu = torch.device("cpu")
    items = reservations(layouts, topology.axes, job.config.grad_dtype, cpu, split_masters=split)
    frozen = job.comm.frozen if job.comm is not None and job.stage == 3 else None
    stored = stored_items(items, frozen)
    tiers = job.tiers_of(stored)
    disk_bytes = _add_shards(items, stored, tiers, in_fp32, device, host)
    per_element = sum(dtype.itemsize for dtype in job.states.values())
    alone, together = [], 0
    for layout in layouts:
        dtype = dtype_of(layout)
        if layout.unit is None:
            device[allocation_tracker.PARAMETERS] += layout.padded_numel * dtype.itemsize
        elif 1 < job.config.secondary_ranks < topology.axes[layout.axis].size:
            secondary = -(-layout.padded_numel // job.config.secondary_ranks) * dtype.itemsize
            device[allocation_tracker.PARAMETERS] += secondary
        if layout.group == FROZEN:
            continue
        owned = layout.owned_range(0)
        stepped = sum(piece_of(slot, *owned).numel for slot in layout.slots)
        tier = tiers[ShardKey(name=layout.name, kind=STATE)]
        if tier != "disk":
            (host if tier == "host" else device)[allocation_tracker.STATES] += stepped * per_element
            continue
        disk_bytes += stepped * per_element
        if any(tiers.get(ShardKey(name=layout.name, kind=kind)) == "disk" for kind in _PURPOSE_OF_KIND):
            alone.append(stepped)
        else:
            together += stepped
    if alone or together:
        host[allocation_tracker.STATES] += job.page_buffer_bytes(alone, together)
    disk_bytes += _add_early_steps(job, layouts, tiers, device, host)
    return Resting(device, host, disk_bytes, _kinds(tiers), _tensors(items, stored, layouts, per_element))


def _add_shards(
    items: Sequence[Reservation],
    stored: Sequence[Reservation],
    tiers: Mapping[ShardKey, Tier],
    in_fp32: Collection[str],
    device: Counter[str],
    host: Counter[str],
) -> int:
    """Adds the bytes of parameters, masters and gradients in memory, with the buffers of those that are on a disk.
    Returns the bytes on the disk.

    Args:
        items: the tensors with the values of the optimizer and of the model.
        stored: the same as a store keeps them.
        in_fp32: buckets of stage 3 whose masters are the parameters.
    """
    disk_bytes = 0
    staged: dict[tuple[str, torch.dtype], list[int]] = {}
    for item, kept in zip(items, stored, strict=True):
        tier = tiers[item.key]
        if tier == "disk":
            disk_bytes += _bytes_of(kept)
            staged.setdefault((item.key.kind, item.dtype), []).append(_bytes_of(item))
            continue
        place = host if tier == "host" else device
        purpose = _PURPOSE_OF_KIND[item.key.kind]
        if item.key.kind == "master" and item.key.name in in_fp32:
            purpose = allocation_tracker.PARAMETERS
        place[purpose] += _bytes_of(kept)
    for (kind, _), sizes in staged.items():
        host[_PURPOSE_OF_KIND[kind]] += min(NUM_BUFFERS, len(sizes)) * max(sizes)
    return disk_bytes


def _bytes_of(item: Reservation) -> int:
    return item.numel * item.dtype.itemsize


def _tensors(
    items: Sequence[Reservation],
    stored: Sequence[Reservation],
    layouts: Sequence[BucketLayout],
    state_bytes: int,
) -> tuple[StoredTensor, ...]:
    width = {layout.name: dtype_of(layout).itemsize for layout in layouts}
    made = [(item.key, item.numel, _bytes_of(kept)) for item, kept in zip(items, stored, strict=True)]
    made += [
        (ShardKey(name=item.key.name, kind=STATE), item.numel, item.numel * state_bytes)
        for item in items
        if item.key.kind == "grad"
    ]
    return tuple(
        StoredTensor(name=key.name, kind=key.kind, num_bytes=size, compute_bytes=numel * width[key.name])
        for key, numel, size in made
    )


def _add_early_steps(
    job: Job,
    layouts: Sequence[BucketLayout],
    tiers: Mapping[ShardKey, Tier],
    device: Counter[str],
    host: Counter[str],
) -> int:
    """Adds the bytes of `early_step_bytes` in memory. Returns those on the disk."""
    early = early_step_bytes(job, layouts, tiers)
    device[allocation_tracker.MASTERS] += early.device
    host[allocation_tracker.MASTERS] += early.host
    return early.disk


def _kinds(tiers: Mapping[ShardKey, Tier]) -> Mapping[Tier, frozenset[str]]:
    kinds: dict[Tier, set[str]] = {"device": set(), "host": set(), "disk": set()}
    for key, tier in tiers.items():
        kinds[tier].add(key.kind)
    return {tier: frozenset(names) for tier, names in kinds.items()}


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]
