"""Sharded state as ranges of named, flattened tensors, for checkpoints that do not depend on ranks or stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_zero import _registry
from ds_zero.interfaces import (
    EVERYWHERE,
    Coordinates,
    PagesState,
    RecordSource,
    SplitsMasters,
)
from ds_zero.layout.buckets import Slot
from ds_zero.params.logical import LogicalSource, Reading, whole_records
from ds_zero.params.stored_values import BucketReader, StoredTensor
from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.optimizer_states import (
    MASTER_BITS,
    check_convertible,
    new_state,
    splits_masters,
    states_opened,
)
from ds_zero.state import ZeroState

PARAM, BUFFER = "param", "buffer"


@dataclass(frozen=True)
class ShardRecord:
    """Elements [flat_offset, flat_offset + data.numel()) of one flattened tensor of the model or optimizer."""

    fqn: str
    """Name of the parameter or buffer."""
    state: str
    """"param" (the fp32 master, or the frozen parameter itself), "buffer", or the name of an optimizer state."""
    global_shape: tuple[int, ...]
    """Shape of the whole tensor, which is () for a number."""
    flat_offset: int
    data: Tensor | StoredTensor
    """1-D, contiguous: a view of the tensor, or a `StoredTensor` if it is away ([Note: tensors that are away])."""
    coordinates: Coordinates = field(default_factory=dict)
    """Distinguishes tensors with the same name: {"expert": (i, n)} for set i of n sets of ranks that have different
    values (`mesh_for`); empty for others, and for runs of one stacked tensor ([Note: stacked parameters])."""


@dataclass(frozen=True)
class Range:
    """This rank's part of one parameter."""

    slot: Slot
    bucket: Bucket
    index: int
    start: int
    """Index of the first element in the flattened parameter."""
    numel: int
    offset: int
    """Index of the first element in this rank's owned range of the bucket."""
    shard_start: int
    """Index of the optimizer shard's first element in the flattened parameter."""

    def of(self, owned: Tensor) -> Tensor:
        """Returns this range of a 1-D tensor over the owned range of the bucket."""
        return owned[self.offset : self.offset + self.numel]

    @property
    def values(self) -> Tensor:
        """This range of the master, or of the frozen parameter. It must be addressable."""
        owned = self.bucket.storage.addressable(self.bucket.storage.exact)
        assert owned is not None, "a tensor that is away must be opened"
        return self.of(owned.detach())

    @property
    def fqn(self) -> str:
        return self.slot.fqn

    @property
    def coordinates(self) -> dict[str, tuple[int, int]]:
        return coordinates_of(self.bucket, self.slot)

    @property
    def logical_start(self) -> int:
        """Index of the first element in the flattened logical tensor, [Note: stacked parameters]."""
        return self.slot.logical_start + self.start

    @property
    def element_shape(self) -> tuple[int, ...]:
        """Shape of an element-wise state of the logical tensor."""
        return self.slot.logical_shape or (1,)

    def record(
        self, state: str, shape: tuple[int, ...], start: int, data: Tensor | StoredTensor
    ) -> ShardRecord:
        """Returns a record of the elements from `start` on of the logical tensor or one of its states."""
        return ShardRecord(self.fqn, state, shape, start, data, self.coordinates)


def coordinates_of(bucket: Bucket, slot: Slot) -> dict[str, tuple[int, int]]:
    """Returns `ShardRecord.coordinates` of a parameter."""
    index, count = bucket.ranks.part
    return {"expert": (index, count)} if count > 1 and slot.run[1] == 1 else {}


def ranges(state: ZeroState, *, owned: bool) -> Iterator[Range]:
    """Yields this rank's ranges of all parameters: the owned ranges, or, without `owned`, only its slices. The slices
    of all ranks contain every element exactly once.
    """
    for bucket in state.buckets:
        rank = bucket.ranks.rank
        if not owned and bucket.ranks.replicas is not None and bucket.ranks.replicas.rank > 0:
            continue  # the first replica has the same slices
        first, last = bucket.owned_range
        begin, end = (first, last) if owned else bucket.slice_range
        for index, slot in enumerate(bucket.layout.slots):
            low, high = max(slot.offset, begin), min(slot.end, end)
            if high <= low and not (slot.numel == 0 and rank == 0):
                continue
            yield Range(
                slot=slot,
                bucket=bucket,
                index=index,
                start=low - slot.offset,
                numel=max(high - low, 0),
                offset=low - first,
                shard_start=max(slot.offset, first) - slot.offset,
            )


def records(model: nn.Module, optimizer: Optimizer) -> list[ShardRecord]:
    """Returns the parts of parameters, buffers and optimizer states that this rank writes to a checkpoint. At any
    stage, the records of all ranks contain every element of every tensor exactly once.

    Scalar states (Adam's `step`) are in the records of the rank that has the parameter's first element, buffers in
    those of rank 0.

    With `ZeroConfig(checksums=True)`, masters and states are compared with their checksums first: collective, and all
    ranks raise `ChecksumError` if one of them differs.
    """
    state = _registry.state_of(model)
    state.stepper.settle()
    state.checksums.before_save()
    own_records: list[ShardRecord] = []
    reader = BucketReader(optimizer)
    for r in ranges(state, owned=False):
        own_records.append(
            r.record(PARAM, r.slot.logical_shape, r.logical_start, _own_values(r, optimizer, reader))
        )
        if not r.bucket.shards:
            continue
        shard = r.bucket.shards[r.index]
        if isinstance(optimizer, PagesState):
            dtypes, others = optimizer.stored_states(shard)
            own_records += [
                _stored_state(r, name, dtype, reader) for name, dtype in dtypes.items() if name != MASTER_BITS
            ]
        else:
            others = optimizer.state.get(shard, {})
        for name, value in others.items():
            if name == MASTER_BITS:
                continue  # a part of the master
            own_records += _state_record(r, name, value, shard)
    if state.ranks.first:
        for fqn, buffer in saved_buffers(model).items():
            own_records.append(ShardRecord(fqn, BUFFER, tuple(buffer.shape), 0, buffer.detach().reshape(-1)))
    parts = state.topology.tensor_parts
    return own_records if parts is None else list(whole_records(parts, own_records))


def _own_values(r: Range, optimizer: Optimizer, reader: BucketReader) -> Tensor | StoredTensor:
    """Returns this rank's part of the authoritative values of a parameter; split masters are joined."""
    storage = r.bucket.storage
    splits = splits_masters(optimizer)
    if splits is not None and r.bucket.trainable and storage.exact_dtype == torch.bfloat16:
        return StoredTensor(r.numel, torch.float32, lambda: _joined(r, splits, reader))
    if storage.addressable(storage.exact) is not None:
        return r.values
    return StoredTensor(r.numel, storage.exact_dtype, lambda: r.of(reader.values(r.bucket)))


def _joined(r: Range, splits: SplitsMasters, reader: BucketReader) -> Tensor:
    values, begin = r.of(reader.values(r.bucket)), r.start - r.shard_start
    held = reader.states(r.bucket)[r.index].get(MASTER_BITS)
    if held is None:  # before the first step
        return values.to(torch.float32)
    return splits.join_master(values, held.reshape(-1)[begin : begin + r.numel])


def _stored_state(r: Range, name: str, dtype: torch.dtype, reader: BucketReader) -> ShardRecord:
    """Returns the record of an element-wise optimizer state that is away."""
    begin = r.start - r.shard_start

    def load() -> Tensor:
        return reader.state(r.bucket, r.index, name).reshape(-1)[begin : begin + r.numel]

    return r.record(name, r.element_shape, r.logical_start, StoredTensor(r.numel, dtype, load))


def _state_record(r: Range, name: str, value: object, shard: Tensor) -> list[ShardRecord]:
    if isinstance(value, Tensor) and value.ndim > 0 and value.shape == shard.shape:
        begin = r.start - r.shard_start
        own = value.reshape(-1)[begin : begin + r.numel]
        return [r.record(name, r.element_shape, r.logical_start, own)]
    if r.logical_start != 0:
        return []
    if isinstance(value, Tensor) and value.ndim == 0:
        return [r.record(name, (), 0, value.detach().reshape(1))]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [r.record(name, (), 0, torch.tensor([value], dtype=torch.float64))]
    if (
        isinstance(value, Tensor) and r.bucket.layout.undivided and r.slot.run[1] == 1
    ):  # another shape than the parameter, as of Adafactor
        return [r.record(name, tuple(value.shape), 0, value.detach().reshape(-1))]
    if value is None:
        return []
    raise ValueError(
        f"optimizer state {name!r} of parameter {r.fqn!r} is neither element-wise nor a number "
        f"({type(value).__name__}): it cannot be saved from shards. Store it as a number, or as a tensor of the "
        "parameter's shape"
    )


def group_names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """Returns, for each of the optimizer's groups, the names of the parameters of its entries."""
    state = _registry.state_of(model)
    names = {
        id(shard): slot.fqn
        for bucket in state.buckets
        for shard, slot in zip(bucket.shards, bucket.layout.slots, strict=False)
    }
    return [[names[id(shard)] for shard in group["params"]] for group in optimizer.param_groups]


def load_records(
    model: nn.Module,
    optimizer: Optimizer | None,
    source: RecordSource,
    *,
    optimizer_states: bool = True,
    keep: AbstractSet[str] = frozenset(),
    expect: Callable[[Sequence[Reading]], None] | None = None,
) -> None:
    """Reads this rank's ranges of every parameter, buffer and optimizer state from `source`, then updates the
    parameters of all ranks. Collective.

    The checkpoint may have been written at any stage and by any number of ranks.

    Args:
        optimizer: the model's optimizer; None if no states are to be read.
        optimizer_states: whether to read optimizer states.
        keep: names of tensors that are not read. They and their states keep their values.
        expect: called before the first read with all reads in order, for sources that read ahead.

    Raises:
        ValueError: the source lacks a tensor, or has it in another shape. Nothing has been changed then.
    """
    held = _registry.state_of(model).topology.tensor_parts
    if held is None:
        _load_own_records(
            model, optimizer, source, optimizer_states=optimizer_states, keep=keep, expect=expect
        )
        return
    parts = LogicalSource(source, held.parts)
    translated = None if expect is None else lambda reads: expect(list(parts.readings(iter(reads))))
    _load_own_records(
        model, optimizer, parts, optimizer_states=optimizer_states, keep=keep, expect=translated
    )


def _load_own_records(
    model: nn.Module,
    optimizer: Optimizer | None,
    source: RecordSource,
    *,
    optimizer_states: bool = True,
    keep: AbstractSet[str] = frozenset(),
    expect: Callable[[Sequence[Reading]], None] | None = None,
) -> None:
    """`load_records` from a source that has this rank's tensors, not whole ones, of a tensor-parallel model."""
    state = _registry.state_of(model)
    state.stepper.settle()
    _check(state, model, source, keep)
    state.stepper.forget()  # gradients with respect to the replaced values, such as in the middle of an accumulation
    if expect is not None:
        expect(list(_to_be_read(state, source, optimizer_states, keep)))
    with_states = optimizer if optimizer_states else None
    # Without states, too: the bits of split masters belong to the values.
    splitting = optimizer or (state.optimizer() if state.optimizer is not None else None)
    splitting = splitting if splits_masters(splitting) is not None else None
    with torch.no_grad():
        for bucket, parts in groupby(ranges(state, owned=True), key=lambda r: r.bucket):
            with (
                bucket.storage.opened(bucket.storage.exact, write=True) as values,
                states_opened(with_states or splitting, bucket.shards, write=True),
            ):
                for r in parts:
                    if r.slot.fqn in keep:
                        continue
                    master = _master_to_read(r, splitting, values)
                    source.read(r.fqn, PARAM, r.logical_start, master, r.coordinates)
                    if bucket.shards and with_states is not None:
                        _load_states(r, with_states, source)
                    if bucket.shards and splitting is not None:
                        _split(r, splitting, values, master)
        for fqn, buffer in saved_buffers(model).items():
            if fqn in keep:
                continue
            flat = torch.empty_like(buffer).reshape(-1)
            source.read(fqn, BUFFER, 0, flat)
            buffer.copy_(flat.view(buffer.shape))
    publish_loaded(state)


def publish_loaded(state: ZeroState) -> None:
    """Updates the parameters of all ranks after masters and frozen parameters have been loaded. Collective."""
    with torch.no_grad():
        for bucket in state.buckets:
            bucket.refresh_params()
    _share_frozen(state)
    state.refresh()
    state.gatherer.drop_all()
    state.checksums.loaded()


def _to_be_read(
    state: ZeroState, source: RecordSource, optimizer_states: bool, keep: AbstractSet[str]
) -> Iterator[Reading]:
    """Yields the reads of `load_records` in order, without those of buffers."""
    for r in ranges(state, owned=True):
        if r.slot.fqn in keep:
            continue
        yield r.fqn, PARAM, r.coordinates, r.logical_start, r.numel
        if not (r.bucket.shards and optimizer_states):
            continue
        for name, (shape, _) in source.states(r.fqn, r.coordinates).items():
            if name != PARAM:
                if _is_ranged(r, shape):
                    yield r.fqn, name, r.coordinates, r.logical_start, r.numel
                else:
                    yield r.fqn, name, r.coordinates, 0, math.prod(shape)


def _is_ranged(r: Range, shape: Sequence[int]) -> bool:
    """Whether a state is element-wise, so that this rank reads only its range. Otherwise it is a number, or a tensor of
    another shape, which exists only in the whole layout. An element-wise state of a 0-dim parameter has the shape (1,),
    which distinguishes it from a number.
    """
    return tuple(shape) == r.element_shape


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Returns the persistent buffers by name."""
    persistent = model.state_dict(keep_vars=True).keys()
    return {fqn: buffer for fqn, buffer in model.named_buffers() if fqn in persistent}


def _share_frozen(state: ZeroState) -> None:
    """Gathers whole frozen buckets of which each rank has read only its slice."""
    for bucket in state.buckets:
        if not bucket.trainable and bucket.whole and bucket.layout.num_owners > 1:
            state.comm.gather(bucket.full, bucket.ranks, sizes=bucket.layout.slice_sizes).wait()


def _check(state: ZeroState, model: nn.Module, source: RecordSource, keep: AbstractSet[str]) -> None:
    wanted: dict[str, tuple[str, Coordinates, tuple[int, ...]]] = {
        slot.fqn: (PARAM, coordinates_of(bucket, slot), slot.logical_shape)
        for bucket in state.buckets
        for slot in bucket.layout.slots
    }
    wanted |= {fqn: (BUFFER, EVERYWHERE, tuple(b.shape)) for fqn, b in saved_buffers(model).items()}
    stored = {fqn: source.states(fqn, where) for fqn, (_, where, _) in wanted.items() if fqn not in keep}
    missing = [fqn for fqn, states in stored.items() if wanted[fqn][0] not in states]
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} of {len(stored)} tensors of the model, first {missing[:5]}: "
            "it was written for another model"
        )
    for fqn, states in stored.items():
        kind, _, shape = wanted[fqn]
        stored_shape = tuple(states[kind][0])
        if stored_shape != shape:
            raise ValueError(
                f"{fqn!r} has shape {shape} in the model and {stored_shape} in the checkpoint: use the model it was "
                "written for"
            )


def _master_to_read(r: Range, optimizer: Optimizer | None, values: Tensor) -> Tensor:
    """Returns the tensor into which a parameter is read: fp32 if its master is split afterwards."""
    own = r.of(values)
    splits = r.bucket.trainable and own.dtype == torch.bfloat16 and splits_masters(optimizer) is not None
    return torch.empty(own.shape, dtype=torch.float32, device=own.device) if splits else own


def _split(r: Range, optimizer: Optimizer, values: Tensor, master: Tensor) -> None:
    """Stores both halves of a master that was read in fp32."""
    splits = splits_masters(optimizer)
    if splits is None or master.dtype == values.dtype:
        return
    shard = r.bucket.shards[r.index]
    high, low = splits.split_master(master)
    r.of(values).copy_(high)
    held = optimizer.state[shard]
    if not held and not low.any():
        return  # saved before the first step: there are no states yet
    if MASTER_BITS not in held:
        held[MASTER_BITS] = new_state(optimizer, shard, MASTER_BITS, torch.int16)
    begin = r.start - r.shard_start
    held[MASTER_BITS].view(-1)[begin : begin + r.numel].copy_(low)


def _load_states(r: Range, optimizer: Optimizer, source: RecordSource) -> None:
    shard = r.bucket.shards[r.index]
    held = optimizer.state[shard]
    stored = {name: kind for name, kind in source.states(r.fqn, r.coordinates).items() if name != PARAM}
    for name in held.keys() - stored.keys() - {MASTER_BITS}:
        del held[name]  # a state of this run that the checkpoint does not contain
    for name, (shape, dtype) in stored.items():
        if _is_ranged(r, shape):
            if name not in held:
                held[name] = new_state(optimizer, shard, name, dtype)
            check_convertible(name, held[name].dtype, dtype)
            begin = r.start - r.shard_start
            own = held[name].view(-1)[begin : begin + r.numel]
            source.read(r.fqn, name, r.logical_start, own, r.coordinates)
        else:
            flat = torch.empty(math.prod(shape), dtype=dtype, device=shard.device if shape else None)
            source.read(r.fqn, name, 0, flat, r.coordinates)
            held[name] = flat.view(tuple(shape))
