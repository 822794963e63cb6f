"""Gathers whole values of sharded parameters, for reading and writing."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_zero import _registry
from ds_zero.layout.buckets import Slot
from ds_zero.params.deferred_values import gathered_before_shard
from ds_zero.params.gathered_context import OpenGather
from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.materialize import broadcast_values
from ds_zero.runtime.optimizer_states import clear_master_bits, joined_masters
from ds_zero.runtime.storage import MASTER, PARAM
from ds_zero.state import ZeroState


@contextlib.contextmanager
def gathered(
    params: nn.Module | nn.Parameter | Iterable[nn.Parameter], write: bool = False, *, writer_rank: int = 0
) -> Iterator[None]:
    """Context manager in which the parameters are whole on every rank, at every stage.

    Collective: all ranks must enter and leave the context with the same parameters: a module, or any parameters, also
    of several sharded models.

    With `write`, all ranks get the values that `writer_rank` has at the end, including masters. Elements that were
    not written keep the full precision of their master. No change is lost silently: a change without `write`, or only
    on another rank, raises on every rank, even if it was made through `.data`. Contexts may be nested; an outer
    context with `write` keeps changes in an inner context without it. After an exception changes are discarded.
    Parameters that were constructed under `deferred_init` and are not sharded yet have their values inside the
    context, see [Note: constructed parameters].

    Raises:
        ValueError: a parameter is not sharded, a change would be lost, or there was an optimizer step inside the
            context.
    """
    named = params.parameters() if isinstance(params, nn.Module) else params
    wanted = [named] if isinstance(named, nn.Parameter) else list(named)
    not_sharded_yet = [p for p in wanted if _registry.find_record(p) is not None]
    buckets_of: dict[int, tuple[ZeroState, dict[int, Bucket]]] = {}
    for param in wanted:
        if any(param is other for other in not_sharded_yet):
            continue
        state = _registry.state_of(param)
        bucket, _ = state.bucket_of(param)
        buckets_of.setdefault(id(state), (state, {}))[1][id(bucket)] = bucket
    with contextlib.ExitStack() as stack:
        if not_sharded_yet:
            stack.enter_context(gathered_before_shard(not_sharded_yet, writer_rank if write else None))
        for state, wanted_buckets in buckets_of.values():
            # In the same order on all ranks, whatever the order of `params`.
            buckets = [b for b in state.buckets if id(b) in wanted_buckets]
            stack.enter_context(_gathered(state, buckets, writer_rank if write else None))
        yield


@contextlib.contextmanager
def _gathered(state: ZeroState, buckets: list[Bucket], writer: int | None) -> Iterator[None]:
    """`gathered` for the buckets of one model; `writer` is None for a context that does not write."""
    smallest = min(b.ranks.size for b in buckets)
    if writer is not None and not 0 <= writer < smallest:
        raise ValueError(f"writer_rank={writer}: the model is sharded among ranks 0 to {smallest - 1}")
    if writer is not None:
        state.stepper.settle()
    state.stepper.wait()
    state.gatherer.acquire(buckets)
    opened = OpenGather(buckets, writes=writer is not None)
    state.open_gathers.append(opened)
    try:
        yield
        if not state.gatherer.holds(buckets):
            raise ValueError(
                "optimizer.step() or a failed backward inside ds_zero.gathered has dropped the gathered values: leave "
                "the context first"
            )
        _apply_changes(state, opened, writer)
    finally:
        state.open_gathers.remove(opened)
        if state.gatherer.holds(buckets):
            state.gatherer.release(buckets)


def _apply_changes(state: ZeroState, opened: OpenGather, writer: int | None) -> None:
    """Keeps the changes of the writer, and raises for changes that would be lost."""
    if writer is None and all(state.is_written(bucket) for bucket in opened.buckets):
        return  # an outer context keeps them
    changed = opened.changed()
    # Equal on all ranks of a bucket; ranks of other experts may have changed other buckets.
    touched = [bucket for bucket in opened.buckets if changed[id(bucket)].any()]
    if writer is not None and touched:
        opened.put_back(touched)
        _adopt(state, touched, writer)
        for other in state.open_gathers:
            other.refresh(touched)
        state.checksums.retake(touched)
    lost: list[str] = []
    who: set[int] = set()
    for bucket in touched:
        by_rank = changed[id(bucket)]  # (replicas, ranks, parameters)
        bad = by_rank.any(0).any(0)
        if writer is not None:
            bad &= ~by_rank[0, writer]
        lost += [slot.fqn for slot, is_bad in zip(bucket.layout.slots, bad.tolist(), strict=True) if is_bad]
        who |= set(by_rank[:, :, bad].any(2).any(0).nonzero().reshape(-1).tolist())
    if lost and writer is None:
        raise ValueError(
            f"{lost} were written inside gathered(..., write=False): the change would be lost; pass write=True"
        )
    if lost:
        raise ValueError(
            f"{lost} were written by ranks {sorted(who)} but not by rank {writer}, whose values are used: the "
            "change would be lost; write on every rank, or pass writer_rank="
        )


def _adopt(state: ZeroState, buckets: list[Bucket], writer: int) -> None:
    """Copies the writer's values to the shards and masters of all ranks."""
    owner = state.optimizer() if state.optimizer is not None else None
    with torch.no_grad():
        for bucket in buckets:
            broadcast_values(bucket.full, bucket.ranks, writer)
            begin, end = bucket.owned_range
            values, storage = bucket.full[begin:end], bucket.storage
            if not bucket.whole:
                with storage.opened(PARAM, write=True, load=False) as param:
                    param.copy_(values)
            bucket.changed()
            if storage.masters_apart:
                with storage.opened(MASTER, write=True) as master:
                    # Masters of elements that were not written keep their full precision.
                    low = values.to(master.device)
                    same = master.to(low.dtype) == low
                    master.copy_(torch.where(same, master, low.float()))
                if storage.exact_dtype == torch.bfloat16:  # the rest of the masters is a state
                    clear_master_bits(owner, bucket.shards, storage.cut(~same))


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns whole values by name, on the CPU of rank 0; an empty dict on other ranks. Collective.

    Parameters are the fp32 masters, frozen ones have their own dtype. Tied parameters appear under each of their names,
    as one tensor. Persistent buffers are included. A stacked parameter of which ranks hold runs is returned whole, as
    are parts of tensor-parallel ranks if they are known (`ModelParallel.part_of`); of other parameters with a mesh of
    their own, the values of the mesh of rank 0. In addition to the result, rank 0 needs memory for one bucket.
    """
    state = _registry.state_of(model)
    state.stepper.settle()
    state.checksums.before_save()
    values: dict[str, Tensor] = {}
    for bucket in state.buckets:
        whole = _whole(state, bucket)
        for slot in bucket.layout.slots:
            value = _with_all_runs(bucket, slot, whole[slot.offset : slot.end])
            if state.ranks.first:
                value = _whole_of_parts(state, slot, value).cpu().clone()
                for name in state.names[slot.fqn]:
                    values[name] = value
    parts = state.topology.tensor_parts
    if not state.ranks.first or (parts is not None and not parts.first):
        return {}
    values |= {n: b.detach().cpu().clone() for n, b in model.named_buffers()}
    listed = [name for name in model.state_dict(keep_vars=True) if name in values]
    # A module may list its parameters under other names (`register_state_dict_post_hook`); here they have their own.
    own = [name for first in state.names for name in state.names[first]]
    return {name: values[name] for name in dict.fromkeys([*listed, *own])}


def _with_all_runs(bucket: Bucket, slot: Slot, own: Tensor) -> Tensor:
    """Returns the flattened logical parameter on the first rank, [Note: stacked parameters]. Collective."""
    across = bucket.ranks.across
    if slot.run[1] == 1 or across is None or across.group is None:
        return own
    runs = [torch.empty_like(own) for _ in range(across.size)]
    dist.all_gather(runs, own.contiguous(), group=across.group)
    return torch.cat(runs)


def _whole_of_parts(state: ZeroState, slot: Slot, own: Tensor) -> Tensor:
    """Returns a whole parameter, of which this rank may have a part. Collective among tensor-parallel ranks."""
    parts = state.topology.tensor_parts
    part = parts.parts.get(slot.fqn) if parts is not None else None
    if part is None:
        return own.view(slot.logical_shape)
    wide = own.float() if own.element_size() < 4 else own
    whole = torch.zeros(math.prod(part.shape), dtype=wide.dtype, device=own.device)
    position = 0
    for start, numel in part.ranges(0, own.numel()):
        whole[start : start + numel] = wide[position : position + numel]
        position += numel
    # Sums with zeros as integers keep all bits, also the sign of a zero.
    across = state.topology.part_ranks
    if across is not None and across.group is not None:
        bits = torch.int32 if wide.element_size() == 4 else torch.int64
        dist.all_reduce(whole.view(bits), group=across.group)
    return whole.to(own.dtype).view(tuple(part.shape))


def _whole(state: ZeroState, bucket: Bucket) -> Tensor:
    """Returns the whole bucket from the masters, or from the parameters if they are frozen. Collective."""
    with bucket.storage.opened(bucket.storage.exact) as values:
        own = values.detach()
        if bucket.trainable and bucket.storage.exact_dtype == torch.bfloat16:
            owner = state.optimizer() if state.optimizer is not None else None
            own = joined_masters(owner, bucket.shards, bucket.storage.cut, own)
        if bucket.layout.num_owners == 1 or bucket.ranks.group is None:
            return own.clone() if bucket.storage.is_away(bucket.storage.exact) else own
        return state.comm.gather_slices(own, bucket.ranks, bucket.device, bucket.layout.slice_sizes)
