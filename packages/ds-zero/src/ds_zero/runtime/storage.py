"""Who owns which kind of tensor of a bucket, and where it rests.

[Note: kinds of a bucket]
param    compute dtype, this rank's owned range. In whole buckets (`unit` is None) a range of `Bucket.full`; where
         `full` comes and goes, at rest in the store.
master   fp32, owned range. Where parameters are fp32, one of the two is an alias of the other: in whole buckets the
         master is the parameter, in others the parameter is the master. None for frozen parameters. The optimizer's
         entries are pieces of it.
grad     `ZeroConfig.grad_dtype`, owned range: reduced gradients, of which `shard.grad` of the entries are pieces. None
         for frozen parameters.

Each is addressable or away, as the store has decided in `reserve` ([Note: tensors that are away]); what is no alias and
was not reserved is an error. All reading and writing goes through `BucketStorage.opened`.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ds_zero.interfaces import Reservation, ShardKey, ShardStore, Work
from ds_zero.layout.buckets import FROZEN, BucketLayout, Piece, piece_of
from ds_zero.runtime.resting import Cut, InMemory, Paged, Resting
from ds_zero.runtime.staging import BufferKind, Staging

if TYPE_CHECKING:
    from ds_zero.runtime.bucket import Bucket

PARAM, MASTER, GRAD = "param", "master", "grad"


@dataclass(frozen=True, kw_only=True)
class Kinds:
    """Which tensors a bucket has at rest, [Note: kinds of a bucket]."""

    reserved: Mapping[str, torch.dtype]
    """Those for which a store is asked."""
    alias: Mapping[str, str] = field(default_factory=dict)
    """Kind -> the kind that is the same tensor."""
    in_full: bool
    """Whether "param" is a range of the bucket's permanent memory."""


def kinds_of(layout: BucketLayout, dtype: torch.dtype, grad_dtype: torch.dtype) -> Kinds:
    """The kinds of a bucket whose parameters compute in `dtype`."""
    whole, fp32 = layout.unit is None, dtype == torch.float32
    if layout.group == FROZEN:
        return Kinds(reserved={} if whole else {PARAM: dtype}, in_full=whole)
    reserved = {GRAD: grad_dtype}
    if not whole and not fp32:
        reserved[PARAM] = dtype
    if not (whole and fp32):
        reserved[MASTER] = torch.float32
    alias = ({MASTER: PARAM} if whole else {PARAM: MASTER}) if fp32 else {}
    return Kinds(reserved=reserved, alias=alias, in_full=whole)


class Reserved:
    """What a store holds for one model."""

    def __init__(self, store: ShardStore, plan: Sequence[Reservation], device: torch.device) -> None:
        self.store, self.device = store, device
        self._items = {item.key: item for item in plan}
        self._mapped = _checked(store, plan)
        sizes: dict[BufferKind, int] = {}
        for item in plan:
            if self.is_away(item.key):
                kind = (item.key.kind, item.dtype)
                sizes[kind] = max(item.numel, sizes.get(kind, 0))
        self.staging = Staging(store, device, sizes)

    @property
    def away(self) -> Sequence[ShardKey]:
        """Keys that the store keeps away."""
        return [key for key in self._items if self.is_away(key)]

    def is_away(self, key: ShardKey) -> bool:
        """Whether the store was asked for `key`, which has elements, and maps it to no tensor."""
        return key in self._items and key not in self._mapped and self._items[key].numel > 0

    def resting(self, key: ShardKey, cut: Cut | None) -> Resting:
        """The tensor of a key.

        Raises:
            ValueError: the store was not asked for it.
        """
        item = self._items.get(key)
        if item is None:
            raise ValueError(
                f"the {key.kind} of bucket {key.name!r} was not reserved with {type(self.store).__name__}"
            )
        if self.is_away(key):
            return Paged(item, self.store, self.staging, cut)
        mapped = self._mapped.get(key)
        if mapped is None:
            mapped = torch.empty(0, dtype=item.dtype, device=item.device)
        return InMemory(mapped, key, self.store, self.staging, cut)

    def add(self, item: Reservation) -> Resting:
        """Reserve one more tensor, of which nobody holds pieces, no larger than the reserved ones of its kind."""
        self._mapped |= _checked(self.store, [item])
        self._items[item.key] = item
        return self.resting(item.key, None)


def _checked(store: ShardStore, plan: Sequence[Reservation]) -> dict[ShardKey, Tensor]:
    """What the store maps, of the size and dtype that it was asked for."""
    mapped = dict(store.reserve(plan))
    for item in plan:
        tensor = mapped.get(item.key)
        if tensor is not None and (tensor.shape != (item.numel,) or tensor.dtype != item.dtype):
            raise ValueError(
                f"{type(store).__name__} reserved a tensor of shape {tuple(tensor.shape)} and dtype {tensor.dtype} for "
                f"the {item.key.kind} of bucket {item.key.name!r}, which needs ({item.numel},) and {item.dtype}"
            )
    return mapped


def _cut(layout: BucketLayout, pieces: Sequence[Piece], tensor: Tensor) -> list[Tensor]:
    """`BucketStorage.cut`."""
    cut = []
    for slot, piece in zip(layout.slots, pieces, strict=True):
        part = tensor[piece.offset : piece.offset + piece.numel]
        cut.append(part.view(slot.shape) if layout.undivided and piece.numel else part)
    return cut


class BucketStorage:
    """The tensors of one bucket on one rank, [Note: kinds of a bucket], with their first values."""

    def __init__(
        self,
        layout: BucketLayout,
        rank: int,
        kinds: Kinds,
        reserved: Reserved,
        full: Tensor,
        values: Tensor,
        trains: Sequence[bool],
    ) -> None:
        """
        Args:
            full: memory of the whole bucket in compute dtype, with its values.
            values: the bucket's values in a dtype that holds each of them exactly.
            trains: for each parameter whether it requires a gradient.
        """
        begin, end = layout.owned_range(rank)
        self.layout = layout
        self.kinds = kinds
        self.pieces: tuple[Piece, ...] = tuple(piece_of(slot, begin, end) for slot in layout.slots)
        """What this rank owns of every slot; offsets count from the beginning of the owned range."""
        self._reserved = reserved
        cut = self.cut = partial(_cut, layout, self.pieces)
        """The pieces of a tensor that has the owned range's elements, in the form of optimizer entries: whole tensors
        in their own shape where they are not divided, else flat."""
        self._rests: dict[str, Resting] = {}
        for kind in kinds.reserved:
            key = ShardKey(name=layout.name, kind=kind)
            self._rests[kind] = rest = reserved.resting(key, None if kind == PARAM else cut)
            if kind != GRAD:
                rest.fill(values[begin:end])
        if kinds.in_full:
            key = ShardKey(name=layout.name, kind=PARAM)
            pieces = cut if kinds.alias else None
            self._rests[PARAM] = InMemory(full[begin:end], key, reserved.store, reserved.staging, pieces)
        for kind, other in kinds.alias.items():
            self._rests[kind] = self._rests[other]
        self._away = frozenset(kind for kind, rest in self._rests.items() if rest.tensor is None)
        self.shards: Sequence[Tensor] = ()
        """Optimizer entries, one a slot, pieces of the master; none for frozen parameters."""
        self.grads: Sequence[Tensor] = ()
        """What `shard.grad` of each is once there is a reduced gradient."""
        if MASTER in self._rests:
            self.shards, self.grads = self._rests[MASTER].pieces, self._rests[GRAD].pieces
            for shard, grad, train in zip(self.shards, self.grads, trains, strict=True):
                shard.requires_grad_(train)
                if grad.dtype != shard.dtype:
                    shard.grad_dtype = None  # its gradient may have another dtype than it
        param = self.addressable(PARAM)
        self.copies: Sequence[Tensor | None] = [None for _ in self.shards]
        """What a fused step writes beside each entry: its range of the addressable parameter, where that is another
        tensor."""
        if self.masters_apart and param is not None:
            self.copies = cut(param)

    # --- which kinds there are

    @property
    def exact(self) -> str:
        """The kind whose values count: "master", or "param" where parameters are frozen."""
        return MASTER if MASTER in self._rests else PARAM

    @property
    def masters_apart(self) -> bool:
        """Whether masters are other tensors than the parameters."""
        return MASTER in self._rests and not self.kinds.alias

    def has(self, kind: str) -> bool:
        """Whether the bucket has a tensor of this kind, as itself or as an alias."""
        return kind in self._rests

    def is_away(self, *kinds: str) -> bool:
        """Whether one of these kinds is not addressable."""
        return not self._away.isdisjoint(kinds)

    @property
    def away(self) -> Sequence[ShardKey]:
        """Keys of the kinds that are not addressable."""
        return [
            ShardKey(name=self.layout.name, kind=kind) for kind in self.kinds.reserved if self.is_away(kind)
        ]

    def addressable(self, kind: str) -> Tensor | None:
        """The tensor itself; None where there is none or it is away."""
        rest = self._rests.get(kind)
        return rest.tensor if rest is not None else None

    def rest(self, kind: str) -> Resting:
        """One kind of this bucket.

        Raises:
            ValueError: it has none of this kind.
        """
        rest = self._rests.get(kind)
        if rest is None:
            raise ValueError(
                f"bucket {self.layout.name!r} has no {kind!r}: it has {', '.join(sorted(self._rests))}"
            )
        return rest

    # --- values

    def opened(self, kind: str, *, write: bool = False, load: bool = True) -> AbstractContextManager[Tensor]:
        """The values of one kind in memory, [Note: tensors that are away].

        Args:
            write: what was changed goes to rest when the context is left without an exception.
            load: False where every element will be written before it is read.
        """
        return self.rest(kind).opened(write=write, load=load)

    def read_param(self, out: Tensor) -> Work:
        """Copy this rank's part of the parameters into `out`."""
        return self._rests[PARAM].read_into(out)

    def refresh_param(self) -> None:
        """Cast the masters into the parameters, where these are other tensors."""
        if self.masters_apart:
            with self.opened(MASTER) as master, self.opened(PARAM, write=True, load=False) as param:
                param.copy_(master)

    def partial_sum(self, index: int, numel: int, device: torch.device) -> Resting:
        """Reserve room for one more sum of gradients."""
        key = ShardKey(name=f"{self.layout.name}+{index}", kind=GRAD)
        dtype = self.kinds.reserved[GRAD]
        partition = f"partial sums {index}"
        return self._reserved.add(
            Reservation(key=key, partition=partition, numel=numel, dtype=dtype, device=device)
        )

    def prefetch(self, kinds: Iterable[str]) -> None:
        """Begin to load what will be opened next; nothing happens for addressable kinds."""
        for kind in kinds:
            self._rests[kind].prefetch()

    def abandon(self, kinds: Iterable[str]) -> None:
        """Undo `prefetch` where nobody has opened it since."""
        for kind in kinds:
            self._rests[kind].abandon()

    def settle(self) -> None:
        """Return when the store has nothing under way for this bucket."""
        for rest in self._rests.values():
            rest.settle()

    @property
    def staging(self) -> Staging:
        """The buffers that all buckets of the model share."""
        return self._reserved.staging


def visit(
    buckets: Sequence[Bucket], kinds: Sequence[str], *, write: Collection[str] = ()
) -> Generator[Bucket, None, None]:
    """Each bucket in turn with its `kinds` in memory; those of the next one are loaded and those of the last one stored
    meanwhile. Wrap it in `contextlib.closing` where the loop may raise: a bucket that is left so is not stored.

    Args:
        write: kinds that are changed.
    """
    away = iter([b for b in buckets if b.storage.is_away(*kinds)])
    ahead: Bucket | None = None
    next(away, None)
    try:
        for bucket in buckets:
            if not bucket.storage.is_away(*kinds):
                yield bucket
                continue
            with ExitStack() as opened:
                for kind in kinds:
                    opened.enter_context(bucket.storage.opened(kind, write=kind in write))
                ahead = next(away, None)
                if ahead is not None:
                    ahead.storage.prefetch(kinds)
                yield bucket
    finally:
        if ahead is not None:
            ahead.storage.abandon(kinds)
