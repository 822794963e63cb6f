"""Sharded state as logical ranges by name, for checkpoints that know nothing of ranks or stages."""

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
from ds_zero.interfaces import EVERYWHERE, Coordinates, RecordSource
from ds_zero.layout.buckets import Slot
from ds_zero.runtime.bucket import Bucket
from ds_zero.state import ZeroState

PARAM, BUFFER = "param", "buffer"
Reading = tuple[str, str, Coordinates, int, int]
"""What is read from a source at once: name, state, coordinates, first element, number of elements."""


@dataclass(frozen=True)
class ShardRecord:
    """Elements [flat_offset, flat_offset + data.numel()) of one flattened logical tensor."""

    fqn: str
    """Name of the parameter or buffer."""
    state: str
    """"param" (the fp32 master, or the frozen parameter itself), "buffer", or the optimizer's name of a
    state."""
    global_shape: tuple[int, ...]
    flat_offset: int
    data: Tensor
    """1-D, contiguous: a view of the live tensor, or a copy where the store keeps that away."""
    coordinates: Coordinates = field(default_factory=dict)
    """Which of the tensors of that name it is: {"expert": (i, n)} where n sets of ranks hold different values under it
    (`mesh_for`)."""


@dataclass(frozen=True)
class Range:
    """What one rank has of one parameter."""

    slot: Slot
    bucket: Bucket
    index: int
    start: int
    """First element within the parameter."""
    numel: int
    offset: int
    """First element within what this rank owns of the bucket."""
    shard_start: int
    """Where the optimizer's shard starts within the parameter."""

    def of(self, owned: Tensor) -> Tensor:
        """This range of a tensor over everything that the rank owns of the bucket."""
        return owned[self.offset : self.offset + self.numel]

    @property
    def values(self) -> Tensor:
        """This range of the master, or of the frozen parameter's shard, where that is addressable."""
        owned = self.bucket.storage.addressable(self.bucket.storage.exact)
        assert owned is not None, "values that are away have to be opened"
        return self.of(owned.detach())

    @property
    def fqn(self) -> str:
        return self.slot.fqn

    @property
    def coordinates(self) -> dict[str, tuple[int, int]]:
        return coordinates_of(self.bucket)

    def record(self, state: str, shape: tuple[int, ...], start: int, data: Tensor) -> ShardRecord:
        """Elements from `start` on of this parameter, or of one of its states."""
        return ShardRecord(self.fqn, state, shape, start, data, self.coordinates)


def coordinates_of(bucket: Bucket) -> dict[str, tuple[int, int]]:
    """`ShardRecord.coordinates`."""
    index, count = bucket.ranks.part
    return {"expert": (index, count)} if count > 1 else {}


def ranges(state: ZeroState, *, owned: bool) -> Iterator[Range]:
    """This rank's ranges: all it holds (`owned`), or its slice only, so that ranks together have every
    element once.
    """
    for bucket in state.buckets:
        rank = bucket.ranks.rank
        if not owned and bucket.ranks.replicas is not None and bucket.ranks.replicas.rank > 0:
            continue  # the first replica speaks for all
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
    """The pieces of parameters, buffers and optimizer states that this rank writes to a checkpoint. Over all ranks,
    every element of every tensor appears exactly once, at any stage.

    Scalar states (Adam's `step`) come from the rank that has the parameter's first element; buffers from rank
    0.
    """
    state = _registry.state_of(model)
    state.stepper.wait()
    found: list[ShardRecord] = []
    for bucket, parts in groupby(ranges(state, owned=False), key=lambda r: r.bucket):
        kind = bucket.storage.exact
        with bucket.storage.opened(kind) as values:
            for r in parts:
                own = r.of(values).detach()
                own = own.clone() if bucket.storage.is_away(kind) else own
                found.append(r.record(PARAM, r.slot.shape, r.start, own))
                if bucket.shards:
                    shard = bucket.shards[r.index]
                    for name, value in optimizer.state.get(shard, {}).items():
                        found += _state_record(r, name, value, shard)
    if state.ranks.first:
        for fqn, buffer in saved_buffers(model).items():
            found.append(ShardRecord(fqn, BUFFER, tuple(buffer.shape), 0, buffer.detach().reshape(-1)))
    return found


def _state_record(r: Range, name: str, value: object, shard: Tensor) -> list[ShardRecord]:
    if isinstance(value, Tensor) and value.ndim > 0 and value.shape == shard.shape:
        begin = r.start - r.shard_start
        own = value.reshape(-1)[begin : begin + r.numel]
        return [r.record(name, r.slot.shape or (1,), r.start, own)]
    if r.start != 0:
        return []
    if isinstance(value, Tensor) and value.ndim == 0:
        return [r.record(name, (), 0, value.detach().reshape(1))]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [r.record(name, (), 0, torch.tensor([value], dtype=torch.float64))]
    if isinstance(value, Tensor) and r.bucket.layout.undivided:  # of a form of its own, as Adafactor's
        return [r.record(name, tuple(value.shape), 0, value.detach().reshape(-1))]
    if value is None:
        return []
    raise ValueError(
        f"optimizer state {name!r} of parameter {r.fqn!r} is neither element-wise nor a number "
        f"({type(value).__name__}): "
        "it cannot be saved by logical range"
    )


def group_names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """The parameters' names behind the entries of each of the optimizer's groups."""
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
    """Read this rank's ranges of every parameter, buffer and state from `source`, then publish. Collective.

    Works from a checkpoint of any stage and number of ranks.

    Args:
        optimizer: the model's; None where no states are to be read.
        optimizer_states: read those too.
        keep: names of tensors that are not read and stay as they are, with their states.
        expect: called before the first read with everything that will be read, in order. For sources that read ahead.

    Raises:
        ValueError: a tensor that the source lacks or has in another shape; nothing has been changed then.
    """
    state = _registry.state_of(model)
    state.stepper.wait()
    _check(state, model, source, keep)
    state.stepper.forget()  # gradients of the values that are replaced, as in the middle of an accumulation
    if expect is not None:
        expect(list(_to_be_read(state, source, optimizer_states, keep)))
    with torch.no_grad():
        for bucket, parts in groupby(ranges(state, owned=True), key=lambda r: r.bucket):
            with bucket.storage.opened(bucket.storage.exact, write=True) as values:
                for r in parts:
                    if r.slot.fqn in keep:
                        continue
                    source.read(r.fqn, PARAM, r.start, r.of(values), r.coordinates)
                    if bucket.shards and optimizer_states and optimizer is not None:
                        _load_states(r, optimizer, source)
        for fqn, buffer in saved_buffers(model).items():
            if fqn in keep:
                continue
            flat = torch.empty_like(buffer).reshape(-1)
            source.read(fqn, BUFFER, 0, flat)
            buffer.copy_(flat.view(buffer.shape))
    publish_loaded(state)


def publish_loaded(state: ZeroState) -> None:
    """After masters, and frozen parameters' shards, were filled: every rank sees the new values. Collective."""
    with torch.no_grad():
        for bucket in state.buckets:
            bucket.refresh_params()
    _share_frozen(state)
    state.refresh()
    state.gatherer.drop_all()


def _to_be_read(
    state: ZeroState, source: RecordSource, optimizer_states: bool, keep: AbstractSet[str]
) -> Iterator[Reading]:
    """What `load_records` will ask for."""
    for r in ranges(state, owned=True):
        if r.slot.fqn in keep:
            continue
        yield r.fqn, PARAM, r.coordinates, r.start, r.numel
        if not (r.bucket.shards and optimizer_states):
            continue
        for name, (shape, _) in source.states(r.fqn, r.coordinates).items():
            if name != PARAM:
                if _is_ranged(r, shape):
                    yield r.fqn, name, r.coordinates, r.start, r.numel
                else:
                    yield r.fqn, name, r.coordinates, 0, math.prod(shape)


def _is_ranged(r: Range, shape: Sequence[int]) -> bool:
    """Whether a state has an element for each of the parameter's; otherwise it is a number, or of a form of its own,
    which only whole tensors have. (1,) is a state of a 0-dim parameter, told apart from a number.
    """
    return tuple(shape) == (r.slot.shape or (1,))


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers by name."""
    persistent = model.state_dict(keep_vars=True).keys()
    return {fqn: buffer for fqn, buffer in model.named_buffers() if fqn in persistent}


def _share_frozen(state: ZeroState) -> None:
    """Whole frozen buckets that are divided for saving: every rank read its own slice, and needs the rest."""
    for bucket in state.buckets:
        if not bucket.trainable and bucket.whole and bucket.layout.num_owners > 1:
            state.comm.gather(bucket.full, bucket.ranks, sizes=bucket.layout.slice_sizes).wait()


def _check(state: ZeroState, model: nn.Module, source: RecordSource, keep: AbstractSet[str]) -> None:
    wanted: dict[str, tuple[str, Coordinates, tuple[int, ...]]] = {
        slot.fqn: (PARAM, coordinates_of(bucket), slot.shape)
        for bucket in state.buckets
        for slot in bucket.layout.slots
    }
    wanted |= {fqn: (BUFFER, EVERYWHERE, tuple(b.shape)) for fqn, b in saved_buffers(model).items()}
    stored = {fqn: source.states(fqn, where) for fqn, (_, where, _) in wanted.items() if fqn not in keep}
    missing = [fqn for fqn, states in stored.items() if wanted[fqn][0] not in states]
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} of {len(stored)} tensors of the model, first "
            f"{missing[:5]}: "
            "it was written for another model"
        )
    for fqn, states in stored.items():
        kind, _, shape = wanted[fqn]
        there = tuple(states[kind][0])
        if there != shape:
            raise ValueError(
                f"{fqn!r} has shape {shape} in the model and {there} in the checkpoint: use the model it "
                "was written for"
            )


def new_state(optimizer: Optimizer, shard: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for one state, where the optimizer wants it if it has a say (`_new_state`)."""
    make = getattr(optimizer, "_new_state", None)
    made: Tensor = make(shard) if callable(make) else torch.zeros_like(shard, dtype=dtype)
    return made.detach()


def _load_states(r: Range, optimizer: Optimizer, source: RecordSource) -> None:
    shard = r.bucket.shards[r.index]
    held = optimizer.state[shard]
    stored = {name: kind for name, kind in source.states(r.fqn, r.coordinates).items() if name != PARAM}
    for name in held.keys() - stored.keys():
        del held[name]  # gathered by this run: not what the checkpoint stands for
    for name, (shape, dtype) in stored.items():
        if _is_ranged(r, shape):
            if name not in held:
                held[name] = new_state(optimizer, shard, dtype)
            begin = r.start - r.shard_start
            own = held[name].view(-1)[begin : begin + r.numel]
            source.read(r.fqn, name, r.start, own, r.coordinates)
        else:
            flat = torch.empty(math.prod(shape), dtype=dtype, device=shard.device if shape else None)
            source.read(r.fqn, name, 0, flat, r.coordinates)
            held[name] = flat.view(tuple(shape))
