"""Moves a model's values into buckets, and puts shards where the optimizer had parameters."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_zero.comm.peer_memory import AbortFlag
from ds_zero.comm.ranks import Ranks
from ds_zero.comm.topology import Topology
from ds_zero.config import ZeroConfig
from ds_zero.interfaces import Reservation, ShardKey, ShardStore
from ds_zero.layout.buckets import FROZEN, BucketLayout, Slot
from ds_zero.params.deferred import become_real, recorded_values
from ds_zero.runtime.bucket import Bucket, BucketState
from ds_zero.runtime.gathering.secondary import Secondary, secondary_ranks


def compute_dtype(fqn: str, param: nn.Parameter, config: ZeroConfig) -> torch.dtype:
    """The dtype in which a parameter computes."""
    if not param.is_floating_point():
        return param.dtype
    wanted = config.dtype_for(fqn, param) if config.dtype_for is not None else config.param_dtype
    if wanted is not None and not wanted.is_floating_point:
        raise ValueError(f"dtype_for gives {wanted} for {fqn!r}: give a floating-point dtype, or None")
    return wanted or param.dtype


def dtype_of(layout: BucketLayout) -> torch.dtype:
    """The dtype in which the bucket's parameters compute."""
    found: torch.dtype = getattr(torch, layout.dtype.removeprefix("torch."))
    return found


def tell_everybody(tensor: Tensor, ranks: Ranks, source: int = 0) -> None:
    """The values of rank `source` (of the first replica) into `tensor` on all ranks, replicas included.
    Collective.
    """
    for axis, first in zip(reversed(ranks.axes), (0, source)[-len(ranks.axes) :], strict=True):
        if axis.group is not None:
            dist.broadcast(tensor, group=axis.group, group_src=first)


def broadcast_buffers(model: nn.Module, ranks: Ranks) -> None:
    """The first rank's buffers on all ranks."""
    with torch.no_grad():
        for buffer in model.buffers():
            whole = buffer.contiguous()
            tell_everybody(whole, ranks)
            if whole is not buffer:
                buffer.copy_(whole)


def build(
    layouts: Sequence[BucketLayout],
    params: dict[str, nn.Parameter],
    topology: Topology,
    store: ShardStore,
    grad_dtype: torch.dtype,
    device: torch.device,
) -> list[Bucket]:
    """Reserve resting memory, then move one bucket after the other, so that at most one exists twice."""
    axes = topology.axes
    reserved = store.reserve(reservations(layouts, axes, grad_dtype, device))
    values = recorded_values(params)
    buckets = []
    for layout in layouts:
        members = [params[slot.fqn] for slot in layout.slots]
        initial = [values(slot.fqn, params[slot.fqn]) for slot in layout.slots]
        bucket = Bucket(layout, axes[layout.axis], members, dtype_of(layout), device)
        bucket.counted = [slot.fqn not in topology.uncounted for slot in layout.slots]
        for param in members:
            become_real(param, device)
        _fill(bucket, initial, reserved)
        _cut_shards(bucket)
        buckets.append(bucket)
    if device.type == "cpu":
        _return_freed_memory()
    return buckets


def _return_freed_memory() -> None:
    """Give the pages of the model's first values back. glibc keeps freed memory that lies below something alive: after
    sharding 19 M parameters at stage 3 the process was 127 MB above its size with the model, with this 6 MB.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def reservations(
    layouts: Sequence[BucketLayout], axes: Sequence[Ranks], grad_dtype: torch.dtype, device: torch.device
) -> list[Reservation]:
    """The tensors that this rank needs from a store: per bucket a shard, a gradient and a master, as far as there are
    such.
    """
    found: list[Reservation] = []
    for layout in layouts:
        begin, end = layout.owned_range(axes[layout.axis].rank)
        dtype = dtype_of(layout)
        kinds: list[tuple[str, torch.dtype]] = []
        master_is_param = dtype == torch.float32
        if layout.unit is not None and (layout.group == FROZEN or not master_is_param):
            kinds.append(("param", dtype))
        if layout.group != FROZEN:
            kinds.append(("grad", grad_dtype))
            if not (master_is_param and layout.unit is None):
                kinds.append(("master", torch.float32))
        for kind, kind_dtype in kinds:
            found.append(
                Reservation(
                    key=ShardKey(name=layout.name, kind=kind),
                    partition=f"group{layout.group}.{kind}",
                    numel=end - begin,
                    dtype=kind_dtype,
                    device=device,
                )
            )
    # Grouped by kind, so that each partition is one run.
    return sorted(found, key=lambda r: r.partition)


def _fill(bucket: Bucket, values: list[Tensor], reserved: Mapping[ShardKey, Tensor]) -> None:
    """The first rank's values into master, low and full, cast once from what was given."""
    layout = bucket.layout
    begin, end = bucket.owned_range
    exact = _flatten(values, layout, bucket.device)
    tell_everybody(exact, bucket.ranks)
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
    """Values side by side with gaps of zeros, in a dtype that holds each exactly as it was given."""
    dtype = functools.reduce(torch.promote_types, (value.dtype for value in values))
    flat = torch.zeros(layout.padded_numel, dtype=dtype, device=device)
    for value, slot in zip(values, layout.slots, strict=True):
        flat[slot.offset : slot.end].copy_(value.reshape(-1))
    return flat


def _cut_shards(bucket: Bucket) -> None:
    """The optimizer's entries: views of the masters."""
    if bucket.master is None:
        return
    # detach: `data` of a view of a permanent buffer, so that in-place updates are seen by the parameter
    # but not by autograd.
    bucket.shards += [piece.detach() for piece in bucket.cut(bucket.master)]
    for shard, param in zip(bucket.shards, bucket.params, strict=True):
        shard.requires_grad_(param.requires_grad)
        if bucket.grad is not None and bucket.grad.dtype != bucket.master.dtype:
            shard.grad_dtype = None  # its gradient may have another dtype than it


def hand_over(optimizer: Optimizer, buckets: list[Bucket]) -> None:
    """Put shards where parameters were, with length and order kept, and cut existing optimizer state
    along.
    """
    place_of = {id(p): (b, index) for b in buckets if b.trainable for index, p in enumerate(b.params)}
    for group in optimizer.param_groups:
        entries = group["params"]
        for i, param in enumerate(entries):
            bucket, index = place_of[id(param)]
            entries[i] = bucket.shards[index]
            state = optimizer.state.pop(param, None)
            # Whole tensors rest with one rank, and the others know nothing of them.
            if state and (bucket.shards[index].numel() or not bucket.layout.undivided):
                optimizer.state[bucket.shards[index]] = cut_states(bucket, index, state)


NUMBERS = frozenset(["step", "eta", "mu", "mu_product"])
"""States of torch's optimizers that are one number a parameter; where the parameter is 0-dim, shapes do not
tell them from element-wise ones."""


def cut_states(bucket: Bucket, index: int, state: Mapping[str, object]) -> dict[str, object]:
    """What this rank needs of the optimizer's states of one parameter."""
    if bucket.layout.undivided:
        return dict(state)
    slot, piece = bucket.layout.slots[index], bucket.pieces[index]
    return {k: v if k in NUMBERS else _cut(v, slot, piece.start, piece.numel) for k, v in state.items()}


def _cut(value: object, slot: Slot, start: int, numel: int) -> object:
    if (
        isinstance(value, Tensor)
        and value.numel() == slot.numel
        and (value.ndim > 0 or (not slot.shape and value.is_floating_point()))
    ):
        return value.reshape(-1)[start : start + numel].clone()
    return value


class _NearGroup:
    """Takes secondary copies away with the hooks of a model, and their process group."""

    def __init__(self, ranks: Ranks, buckets: Sequence[Bucket]) -> None:
        self._group, self._buckets = ranks.group, list(buckets)

    def remove(self) -> None:
        for bucket in self._buckets:
            bucket.secondary = None
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None


def add_secondary(buckets: Sequence[Bucket], size: int, abort: AbortFlag | None) -> list[_NearGroup]:
    """Give stage-3 buckets a copy that is divided among groups of `size` ranks, where these are fewer than all."""
    found = []
    for ranks in {id(b.ranks): b.ranks for b in buckets if not b.whole}.values():
        if 1 < size < ranks.size:
            near = secondary_ranks(ranks, size, buckets[0].device, abort)
            mine = [b for b in buckets if b.ranks is ranks and not b.whole]
            for bucket in mine:
                bucket.secondary = Secondary(near, bucket.layout.padded_numel, bucket.dtype, bucket.device)
            found.append(_NearGroup(near, mine))
    return found
