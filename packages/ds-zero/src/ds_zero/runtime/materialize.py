"""Moves a model's values into buckets, and replaces the optimizer's parameters by shards."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_zero.comm.ranks import Ranks
from ds_zero.comm.topology import Topology
from ds_zero.config import ZeroConfig
from ds_zero.interfaces import FusedStep, HasInitialStates, Reservation, ShardKey, ShardStore, SplitsMasters
from ds_zero.layout.buckets import FROZEN, BucketLayout, Slot
from ds_zero.params.deferred import become_real, recorded_values
from ds_zero.runtime.bucket import Bucket, whole_memory
from ds_zero.runtime.gathering.secondary import Secondary, secondary_ranks
from ds_zero.runtime.optimizer_states import set_master_bits, split_values
from ds_zero.runtime.storage import BucketStorage, Reserved, kinds_of


def compute_dtype(fqn: str, param: nn.Parameter, config: ZeroConfig) -> torch.dtype:
    """Returns the compute dtype of a parameter."""
    if not param.is_floating_point():
        return param.dtype
    wanted = config.dtype_for(fqn, param) if config.dtype_for is not None else config.param_dtype
    if wanted is not None and not wanted.is_floating_point:
        raise ValueError(
            f"dtype_for returned {wanted} for {fqn!r}: it must return a floating-point dtype, or None"
        )
    return wanted or param.dtype


def dtype_of(layout: BucketLayout) -> torch.dtype:
    """Returns the compute dtype of the bucket's parameters."""
    dtype: torch.dtype = getattr(torch, layout.dtype.removeprefix("torch."))
    return dtype


def broadcast_values(tensor: Tensor, ranks: Ranks, source: int = 0) -> None:
    """Broadcasts `tensor` from rank `source` of the first replica to all ranks of all replicas. Collective."""
    for axis, first in zip(reversed(ranks.axes), (0, source)[-len(ranks.axes) :], strict=True):
        if axis.group is not None:
            dist.broadcast(tensor, group=axis.group, group_src=first)


def broadcast_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Broadcasts the buffers of the first rank. Collective."""
    with torch.no_grad():
        for buffer in model.buffers():
            whole = buffer.contiguous()
            broadcast_values(whole, ranks)
            if whole is not buffer:
                buffer.copy_(whole)


def build(
    layouts: Sequence[BucketLayout],
    params: dict[str, nn.Parameter],
    topology: Topology,
    reserved: Reserved,
    grad_dtype: torch.dtype,
    near: Mapping[int, Ranks],
    *,
    splits: SplitsMasters | None = None,
    built: Callable[[Bucket, Tensor | None], None] = lambda bucket, bits: None,
) -> list[Bucket]:
    """Creates the buckets and moves the model's values into them, one bucket at a time, so that the values of at most
    one bucket are in memory twice. Collective.

    Args:
        near: index of an axis -> the ranks that share a secondary copy, [Note: secondary shards].
        splits: the optimizer, if it splits masters, [Note: split masters].
        built: called with each bucket, and with the (owned,) bits of its masters if these were split.
    """
    axes, device = topology.axes, reserved.device
    values = recorded_values(params)
    buckets = []
    for layout in layouts:
        members = [params[slot.fqn] for slot in layout.slots]
        initial = [values(slot.fqn, params[slot.fqn]) for slot in layout.slots]
        ranks = axes[layout.axis]
        full = whole_memory(layout, dtype_of(layout), device)
        exact = _flatten(initial, layout, device)
        del initial
        broadcast_values(exact, ranks)
        for param in members:
            become_real(param, device)
        with torch.no_grad():
            bits = _copy_rounded(exact, full, layout, ranks.rank, splits)
            kinds = kinds_of(layout, full.dtype, grad_dtype, split_masters=splits is not None)
            trains = [p.requires_grad for p in members]
            rounded = full if bits is not None else exact
            storage = BucketStorage(layout, ranks.rank, kinds, reserved, full, rounded, trains)
        del exact, rounded
        secondary = None
        if layout.unit is not None and layout.axis in near:
            secondary = Secondary(near[layout.axis], layout.padded_numel, full.dtype, device)
        counted = [slot.fqn not in topology.uncounted for slot in layout.slots]
        buckets.append(Bucket(ranks, members, full, storage, counted=counted, secondary=secondary))
        built(buckets[-1], bits)
    if device.type == "cpu":
        _return_freed_memory()
    return buckets


def _copy_rounded(
    exact: Tensor, full: Tensor, layout: BucketLayout, rank: int, splits: SplitsMasters | None
) -> Tensor | None:
    """Copies the values of a bucket to parameters in their compute dtype. Returns the bits of this rank's masters if
    they are split and the values have more bits than the parameters.
    """
    begin, end = layout.owned_range(rank)
    wider = full.dtype == torch.bfloat16 != exact.dtype
    if splits is None or layout.group == FROZEN or not wider or not isinstance(splits, HasInitialStates):
        full.copy_(exact)
        return None
    bits = torch.empty(end - begin, dtype=torch.int16, device=exact.device)
    split_values(splits, exact, full, begin, bits)
    return bits


def _return_freed_memory() -> None:
    """Returns the memory of the model's original values to the system. glibc keeps freed memory below an allocation
    that is in use: without this call, sharding 19 M parameters at stage 3 increased the size of the process by 127 MB,
    with it by 6 MB.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def reservations(
    layouts: Sequence[BucketLayout],
    axes: Sequence[Ranks],
    grad_dtype: torch.dtype,
    device: torch.device,
    *,
    split_masters: bool = False,
) -> list[Reservation]:
    """Returns the tensors that this rank needs from a store, [Note: tensors of a bucket]."""
    items: list[Reservation] = []
    for layout in layouts:
        begin, end = layout.owned_range(axes[layout.axis].rank)
        kinds = kinds_of(layout, dtype_of(layout), grad_dtype, split_masters=split_masters)
        for kind, dtype in kinds.reserved.items():
            items.append(
                Reservation(
                    key=ShardKey(name=layout.name, kind=kind),
                    partition=f"group{layout.group}.{kind}",
                    numel=end - begin,
                    dtype=dtype,
                    device=device,
                )
            )
    # Sorted, so that the tensors of each partition follow each other.
    return sorted(items, key=lambda r: r.partition)


def _flatten(values: list[Tensor], layout: BucketLayout, device: torch.device) -> Tensor:
    """Concatenates values as in the bucket, with zeros in the gaps, in a dtype that represents each of them exactly."""
    dtype = functools.reduce(torch.promote_types, (value.dtype for value in values))
    flat = torch.zeros(layout.padded_numel, dtype=dtype, device=device)
    for value, slot in zip(values, layout.slots, strict=True):
        flat[slot.offset : slot.end].copy_(value.reshape(-1))
    return flat


def check_fused_if_away(optimizer: Optimizer, away: Sequence[ShardKey], store: ShardStore) -> None:
    """Checks that the optimizer has `step_fused` if masters or gradients are away. Another optimizer updates all
    parameters in one call, for which all masters and gradients would have to be in memory.

    Raises:
        ValueError: names optimizer, store and a bucket.
    """
    needed = next((key for key in away if key.kind != "param"), None)
    if needed is not None and not isinstance(optimizer, FusedStep):
        raise ValueError(
            f"{type(optimizer).__name__} steps all its parameters in one call, but {type(store).__name__} keeps the "
            f"{needed.kind} of bucket {needed.name!r} out of memory: use an optimizer that has `step_fused`, which "
            "steps one bucket after the other (ds_core.optim.FusedAdam, ds_offload.CPUAdam), or a store that keeps "
            "masters and gradients in memory (ds_offload.HostStore)"
        )


class OptimizerEntries:
    """The parameters in an optimizer's groups, which shards replace, one bucket at a time."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._places = {
            id(param): (entries, i)
            for entries in (group["params"] for group in optimizer.param_groups)
            for i, param in enumerate(entries)
        }

    def replace(self, bucket: Bucket, bits: Tensor | None = None) -> None:
        """Replaces each parameter of a bucket by its shard, in the same order, and shards existing optimizer states.

        Args:
            bits: those of the bucket's masters, if they are split.
        """
        if not bucket.trainable:
            return
        optimizer = self._optimizer
        for index, (param, shard) in enumerate(zip(bucket.params, bucket.shards, strict=True)):
            entries, i = self._places[id(param)]
            entries[i] = shard
            state = optimizer.state.pop(param, None)
            # In the whole layout one rank owns a tensor, and the other ranks have no state of it.
            if state and (shard.numel() or not bucket.layout.undivided):
                optimizer.state[shard] = cut_states(bucket, index, state)
        if bits is not None:
            set_master_bits(optimizer, bucket.shards, bucket.storage.cut(bits))


NUMBERS = frozenset(["step", "eta", "mu", "mu_product"])
"""States of torch's optimizers that are one number per parameter. For a 0-dim parameter their shape is that of an
element-wise state, so they are recognised by name."""


def cut_states(bucket: Bucket, index: int, state: Mapping[str, object]) -> dict[str, object]:
    """Returns this rank's part of the optimizer's states of one parameter."""
    if bucket.layout.undivided:
        return dict(state)
    slot, piece = bucket.layout.slots[index], bucket.storage.pieces[index]
    return {k: v if k in NUMBERS else _cut(v, slot, piece.start, piece.numel) for k, v in state.items()}


def _cut(value: object, slot: Slot, start: int, numel: int) -> object:
    if (
        isinstance(value, Tensor)
        and value.numel() == slot.numel
        and (value.ndim > 0 or (not slot.shape and value.is_floating_point()))
    ):
        return value.reshape(-1)[start : start + numel].clone()
    return value


class SecondaryGroup:
    """The process group of secondary copies. `remove` drops the copies and destroys the group."""

    def __init__(self, ranks: Ranks, buckets: Sequence[Bucket]) -> None:
        self._group = ranks.group
        self._buckets = [b for b in buckets if b.secondary is not None and b.secondary.ranks is ranks]

    def remove(self) -> None:
        for bucket in self._buckets:
            bucket.drop_secondary()
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None


def near_ranks(
    layouts: Sequence[BucketLayout],
    axes: Sequence[Ranks],
    size: int,
) -> dict[int, Ranks]:
    """Creates the groups of `size` ranks that share a secondary copy of stage-3 buckets, for each axis with more ranks
    than that. Returns this rank's group by the index of its axis. Collective.
    """
    near: dict[int, Ranks] = {}
    for axis in dict.fromkeys(layout.axis for layout in layouts if layout.unit is not None):
        if 1 < size < axes[axis].size:
            near[axis] = secondary_ranks(axes[axis], size)
    return near
