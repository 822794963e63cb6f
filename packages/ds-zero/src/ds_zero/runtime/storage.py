"""The tensors of a bucket that a rank keeps between steps, and where they are stored.

[Note: tensors of a bucket]
Each rank keeps up to three 1-D tensors of a bucket. All of them cover the rank's owned range of the bucket's elements.

param    In the compute dtype. In whole buckets (`layout.unit` is None) it is a range of `Bucket.full`. In sharded
         buckets, whose `full` is allocated only while they are gathered, it is stored separately.
master   In fp32. The optimizer's entries are pieces of it. If parameters compute in fp32, master and param are one
         tensor: in whole buckets that of the parameters, in sharded buckets that of the masters. Frozen parameters
         have none.
grad     In `ZeroConfig.grad_dtype`. The reduced gradients: `shard.grad` of each optimizer entry is a piece of it.
         Frozen parameters have none.

`ShardStore.reserve` decides for each tensor whether it is addressable or away ([Note: tensors that are away]). A tensor
that is neither an alias nor reserved is an error. All reading and writing goes through `BucketStorage.opened`.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ds_zero.interfaces import Reservation, ShardKey, ShardStore, Work
from ds_zero.layout.buckets import FROZEN, BucketLayout, Piece, piece_of
from ds_zero.runtime.away import Paged
from ds_zero.runtime.in_memory import InMemory
from ds_zero.runtime.resting import Cut, Resting, second_key
from ds_zero.runtime.staging import BufferKind, Staging

if TYPE_CHECKING:
    from ds_zero.runtime.bucket import Bucket

PARAM, MASTER, GRAD = "param", "master", "grad"


@dataclass(frozen=True, kw_only=True)
class Kinds:
    """Which tensors a bucket keeps between steps, [Note: tensors of a bucket]."""

    reserved: Mapping[str, torch.dtype]
    """Kind -> dtype of the tensors that the store provides."""
    alias: Mapping[str, str] = field(default_factory=dict)
    """Kind -> the kind that is the same tensor."""
    in_full: bool
    """Whether "param" is a range of `Bucket.full`, which is allocated permanently."""


def kinds_of(
    layout: BucketLayout, dtype: torch.dtype, grad_dtype: torch.dtype, *, split_masters: bool = False
) -> Kinds:
    """Returns the kinds of a bucket whose parameters compute in `dtype`.

    Args:
        split_masters: see `interfaces.SplitsMasters`.
    """
    whole, fp32 = layout.unit is None, dtype == torch.float32
    if layout.group == FROZEN:
        return Kinds(reserved={} if whole else {PARAM: dtype}, in_full=whole)
    reserved = {GRAD: grad_dtype}
    if not whole and not fp32:
        reserved[PARAM] = dtype
    if not (whole and fp32):
        reserved[MASTER] = dtype if split_masters and dtype == torch.bfloat16 else torch.float32
    alias = ({MASTER: PARAM} if whole else {PARAM: MASTER}) if fp32 else {}
    return Kinds(reserved=reserved, alias=alias, in_full=whole)


class Reserved:
    """The tensors of one model that a store provides."""

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
        """Keys of the tensors that are away."""
        return [key for key in self._items if self.is_away(key)]

    def is_away(self, key: ShardKey) -> bool:
        """Whether `key` was reserved, has elements, and was not mapped to a tensor by the store."""
        return key in self._items and key not in self._mapped and self._items[key].numel > 0

    def resting(self, key: ShardKey, cut: Cut | None) -> Resting:
        """Returns the stored tensor of a key.

        Raises:
            ValueError: the key was not reserved.
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

    def reserve_second(self, keys: Sequence[ShardKey]) -> None:
        """Reserves space for second versions of tensors that are away, [Note: two versions of a tensor]."""
        plan = [replace(self._items[key], key=second_key(key), partition="second versions") for key in keys]
        if plan:
            _checked(self.store, plan)

    def add(self, item: Reservation) -> Resting:
        """Reserves one more tensor, without pieces. It must not be larger than the largest reserved one of its kind."""
        self._mapped |= _checked(self.store, [item])
        self._items[item.key] = item
        return self.resting(item.key, None)


def _checked(store: ShardStore, plan: Sequence[Reservation]) -> dict[ShardKey, Tensor]:
    """Reserves `plan`, and returns the tensors of the addressable keys after a check of their sizes and dtypes."""
    mapped = dict(store.reserve(plan))
    for item in plan:
        tensor = mapped.get(item.key)
        if tensor is not None and (tensor.shape != (item.numel,) or tensor.dtype != item.dtype):
            raise ValueError(
                f"{type(store).__name__} reserved a tensor of shape {tuple(tensor.shape)} and dtype {tensor.dtype} for "
                f"the {item.key.kind} of bucket {item.key.name!r}, but shape ({item.numel},) and dtype {item.dtype} "
                "were requested"
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
    """The tensors that one rank keeps of one bucket, [Note: tensors of a bucket]; constructed with initial values."""

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
            full: (padded_numel,), all values of the bucket in the compute dtype.
            values: (padded_numel,), the same values in a dtype that represents each of them exactly.
            trains: for each parameter, whether it requires a gradient.
        """
        begin, end = layout.owned_range(rank)
        self.layout = layout
        self.kinds = kinds
        self._param_dtype = full.dtype
        self.pieces: tuple[Piece, ...] = tuple(piece_of(slot, begin, end) for slot in layout.slots)
        """The part of each slot that this rank owns; offsets are relative to the beginning of the owned range."""
        self._reserved = reserved
        cut = self.cut = partial(_cut, layout, self.pieces)
        """Splits a tensor over the owned range into views, one per parameter, in the shape of the optimizer's entries:
        that of the parameter if the layout does not divide tensors, else 1-D."""
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
        """Optimizer entries, one per slot, which are pieces of the master; empty for frozen parameters."""
        self.grads: Sequence[Tensor] = ()
        """The tensor that `shard.grad` of each entry is set to once its gradient has been reduced."""
        if MASTER in self._rests:
            self.shards, self.grads = self._rests[MASTER].pieces, self._rests[GRAD].pieces
            for shard, grad, train in zip(self.shards, self.grads, trains, strict=True):
                shard.requires_grad_(train)
                if grad.dtype != shard.dtype:
                    shard.grad_dtype = None  # permits a gradient whose dtype differs from the shard's
        param = self.addressable(PARAM)
        self.copies: Sequence[Tensor | None] = [None for _ in self.shards]
        """Where a fused step writes a copy of each updated entry in the compute dtype: its range of the parameter.
        None if the parameter is the same tensor as the master, or is away."""
        if self.masters_apart and param is not None:
            self.copies = cut(param)

    # --- which kinds there are

    @property
    def exact(self) -> str:
        """The kind with the authoritative values: "master", or "param" if the parameters are frozen."""
        return MASTER if MASTER in self._rests else PARAM

    @property
    def exact_dtype(self) -> torch.dtype:
        """Dtype of the authoritative values."""
        kind = self.kinds.alias.get(self.exact, self.exact)
        return self.kinds.reserved.get(kind, self._param_dtype)

    @property
    def masters_apart(self) -> bool:
        """Whether masters and parameters are different tensors."""
        return MASTER in self._rests and not self.kinds.alias

    def has(self, kind: str) -> bool:
        """Whether the bucket has a tensor of this kind, as itself or as an alias."""
        return kind in self._rests

    def is_away(self, *kinds: str) -> bool:
        """Whether at least one of these kinds is away."""
        return not self._away.isdisjoint(kinds)

    @property
    def away(self) -> Sequence[ShardKey]:
        """Keys of the kinds that are away."""
        return [
            ShardKey(name=self.layout.name, kind=kind) for kind in self.kinds.reserved if self.is_away(kind)
        ]

    def addressable(self, kind: str) -> Tensor | None:
        """Returns the tensor itself; None if the bucket has none of this kind or it is away."""
        rest = self._rests.get(kind)
        return rest.tensor if rest is not None else None

    def rest(self, kind: str) -> Resting:
        """Returns the stored tensor of one kind.

        Raises:
            ValueError: the bucket has no tensor of this kind.
        """
        rest = self._rests.get(kind)
        if rest is None:
            raise ValueError(
                f"bucket {self.layout.name!r} has no {kind!r}: it has {', '.join(sorted(self._rests))} "
                "(frozen parameters have neither masters nor gradients)"
            )
        return rest

    # --- values

    def opened(self, kind: str, *, write: bool = False, load: bool = True) -> AbstractContextManager[Tensor]:
        """Context manager that provides the values of one kind in memory, [Note: tensors that are away].

        Args:
            write: store the values when the context is left without an exception.
            load: False if every element will be written before it is read.
        """
        return self.rest(kind).opened(write=write, load=load)

    def read_param(self, out: Tensor) -> Work:
        """Starts to copy this rank's part of the parameters into `out`."""
        return self._rests[PARAM].read_into(out)

    def refresh_param(self) -> None:
        """Casts the masters to the compute dtype and writes them to the parameters, if these are different tensors."""
        if self.masters_apart:
            with self.opened(MASTER) as master, self.opened(PARAM, write=True, load=False) as param:
                param.copy_(master)

    def partial_sum(self, index: int, numel: int, device: torch.device) -> Resting:
        """Reserves a tensor for one more partial sum of gradients."""
        key = ShardKey(name=f"{self.layout.name}+{index}", kind=GRAD)
        dtype = self.kinds.reserved[GRAD]
        partition = f"partial sums {index}"
        return self._reserved.add(
            Reservation(key=key, partition=partition, numel=numel, dtype=dtype, device=device)
        )

    def prefetch(self, kinds: Iterable[str]) -> None:
        """Starts to load kinds that will be opened next. Has no effect on addressable kinds."""
        for kind in kinds:
            self._rests[kind].prefetch()

    def abandon(self, kinds: Iterable[str]) -> None:
        """Undoes `prefetch` of kinds that have not been opened since."""
        for kind in kinds:
            self._rests[kind].abandon()

    def settle(self) -> None:
        """Waits for all operations of the store on this bucket."""
        for rest in self._rests.values():
            rest.settle()

    @property
    def reserved(self) -> Reserved:
        """The tensors of all buckets of the model that the store provides."""
        return self._reserved

    @property
    def staging(self) -> Staging:
        """The staging buffers that all buckets of the model share."""
        return self._reserved.staging


def visit(
    buckets: Sequence[Bucket], kinds: Sequence[str], *, write: Collection[str] = ()
) -> Generator[Bucket, None, None]:
    """Yields each bucket with its `kinds` in memory. Meanwhile those of the next bucket are loaded, and those of the
    previous one are stored. If the loop may raise, wrap the generator in `contextlib.closing`: the bucket at which the
    loop raised is then not stored.

    Args:
        write: the kinds that the loop changes.
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
