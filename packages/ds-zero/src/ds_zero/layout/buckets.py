"""The owner of each element: pure arithmetic, without torch.distributed and tensors.

Legend: a *slot* is the place of one parameter in a bucket; a *bucket* is a padded flat run of slots that is
gathered and reduced in one message; every rank owns one contiguous *slice* of each bucket; a *piece* is the
part of a slot inside a slice; a rank's *partition* of an optimizer group is the concatenation of its slices
of the group's buckets.

Slices are equal and cut through slots (the flat layout), or end where slots end (the whole layout, for
optimizers that need whole tensors): then a slice may be empty, and `assign_whole` balances ranks over all
buckets together.

All cuts fall on multiples of `ALIGN_NUMEL` elements, so a piece of fp32 (128 bytes) or of a 16-bit type (64
bytes) always starts on a cache line, and kernels never see a shared line or a misaligned vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

ALIGN_NUMEL = 32
FROZEN = -1
"""Group index of parameters that are in no optimizer group."""


@dataclass(frozen=True, kw_only=True)
class ParamInfo:
    """The properties of a parameter that determine its bucket."""

    fqn: str
    """Name of the first occurrence in `model.named_parameters()`."""
    shape: tuple[int, ...]
    dtype: str
    """Compute dtype as text, for example "torch.bfloat16"; one bucket holds one dtype."""
    group: int = FROZEN
    """Index of the optimizer group, or `FROZEN`."""
    unit: str | None = None
    """Name of the module with which a stage-3 parameter is gathered; None keeps it whole on every rank."""
    undivided: bool = False
    """Whether one rank owns all of it, for optimizers that need whole tensors."""
    axis: int = 0
    """Index of the axis over which it is sharded; experts have another axis than the rest of the model."""
    by_rows: bool = False
    """Whether only the nonzero rows of its gradient are sent; such a parameter has its own bucket."""
    run: tuple[int, int] = (0, 1)
    """Index of this rank's run among the equal runs of a stacked parameter, and their number."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The place of one parameter in a bucket."""

    fqn: str
    shape: tuple[int, ...]
    offset: int
    """First element in the bucket."""
    run: tuple[int, int] = (0, 1)
    """Index of this rank's run among the equal runs of a stacked parameter, and their number."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        return self.offset + self.numel

    @property
    def logical_shape(self) -> tuple[int, ...]:
        """Shape of the parameter, with all runs if it is stacked."""
        return (self.shape[0] * self.run[1], *self.shape[1:]) if self.run[1] > 1 else self.shape

    @property
    def logical_start(self) -> int:
        """The first element of this rank's run in the flattened logical parameter."""
        return self.run[0] * self.numel


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The part of a slot that lies in one slice; all counts in elements."""

    start: int
    """First element within the flattened parameter."""
    numel: int
    """0 where the slice holds nothing of the slot."""
    offset: int
    """First element within the slice."""


@dataclass(frozen=True, kw_only=True)
class BucketLayout:
    """A padded run of slots and how ranks divide it."""

    name: str
    group: int
    dtype: str
    unit: str | None
    """None: whole on every rank between steps; else the module that gathers it."""
    slots: tuple[Slot, ...]
    num_ranks: int
    """Ranks that exchange this bucket; each sums and sends one slice."""
    num_owners: int
    """Number of ranks over which optimizer states are sharded: `num_ranks`, or 1 in stage 0, where every rank owns the
    whole bucket."""
    undivided: bool = False
    """Whether each tensor is owned by one rank, and optimizer entries have their parameter's shape."""
    cuts: tuple[int, ...] | None = None
    """Boundaries of the slices (`num_ranks` + 1 numbers); None: equal slices."""
    axis: int = 0
    """Index of the set of ranks that exchange it."""
    by_rows: bool = False
    """Whether only nonzero rows of the gradient are sent, [Note: gradients by rows]."""

    @cached_property
    def padded_numel(self) -> int:
        if self.cuts is not None:
            return self.cuts[-1]
        end = self.slots[-1].end if self.slots else 0
        return round_up(end, self.num_ranks * ALIGN_NUMEL)

    @property
    def slice_numel(self) -> int:
        """Elements that one rank reduces and sends; where slices are not equal, the largest."""
        sizes = self.slice_sizes
        return max(sizes) if sizes is not None else self.padded_numel // self.num_ranks

    @property
    def slice_sizes(self) -> list[int] | None:
        """Elements of every slice; None where all are equal."""
        if self.cuts is None:
            return None
        return [end - begin for begin, end in zip(self.cuts, self.cuts[1:], strict=False)]

    @property
    def owned_numel(self) -> int:
        """Elements whose master and states one rank holds; where slices are not equal, the most."""
        return self.padded_numel if self.num_owners == 1 else self.slice_numel

    def slice_range(self, rank: int) -> tuple[int, int]:
        if self.cuts is not None:
            return self.cuts[rank], self.cuts[rank + 1]
        return rank * self.slice_numel, (rank + 1) * self.slice_numel

    def owned_range(self, rank: int) -> tuple[int, int]:
        return (0, self.padded_numel) if self.num_owners == 1 else self.slice_range(rank)

    def gaps(self) -> list[tuple[int, int]]:
        """Ranges that belong to no slot; they have to be zero wherever values are summed."""
        edges = [0, *(x for slot in self.slots for x in (slot.offset, slot.end)), self.padded_numel]
        return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a]


def round_up(n: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `n`."""
    return -(-n // multiple) * multiple


def piece_of(slot: Slot, begin: int, end: int) -> Piece:
    """The part of `slot` in the bucket range [begin, end)."""
    low, high = max(slot.offset, begin), min(slot.end, end)
    if high <= low:
        return Piece(start=0, numel=0, offset=0)
    return Piece(start=low - slot.offset, numel=high - low, offset=low - begin)


def place(params: Iterable[ParamInfo]) -> tuple[Slot, ...]:
    """Slots one after the other, each starting on an aligned element."""
    slots, offset = [], 0
    for info in params:
        slots.append(Slot(fqn=info.fqn, shape=info.shape, offset=offset, run=info.run))
        offset = round_up(offset + info.numel, ALIGN_NUMEL)
    return tuple(slots)


def split_by_size(params: Sequence[ParamInfo], max_numel: int) -> list[list[ParamInfo]]:
    """Runs of at most `max_numel` elements in the given order; a larger parameter is a run of its own."""
    runs: list[list[ParamInfo]] = []
    filled = 0
    for info in params:
        if not runs or filled + info.numel > max_numel:
            runs.append([])
            filled = 0
        runs[-1].append(info)
        filled += info.numel
    return runs


def default_bucket_numel(total_numel: int) -> int:
    """Returns a bucket size that gives about eight buckets per model, so that reductions start while backward is
    running; between 0.25 and 32 M elements.
    """
    return min(max(total_numel // 8, 1 << 18), 1 << 25)


def default_persistence_numel(params: Sequence[ParamInfo]) -> int:
    """Returns the largest threshold up to 1e5 for which the parameters that stay whole are at most 2% of the model.

    Keeping a vector of a few thousand elements takes little memory, while gathering it takes a message. But in a small
    model most parameters are that small, and keeping them whole would defeat stage 3.
    """
    total = sum(p.numel for p in params)
    kept, threshold = 0, 0
    for numel in sorted(p.numel for p in params):
        kept += numel
        if numel > 100_000 or kept * 50 > total:
            break
        threshold = numel
    # A threshold cannot distinguish parameters of equal size, so all of them must fit.
    return threshold if sum(p.numel for p in params if p.numel <= threshold) * 50 <= total else 0


def keep_small_whole(
    params: Sequence[ParamInfo], threshold_numel: int, total_numel: int | None = None
) -> list[ParamInfo]:
    """For stage 3: removes the unit of parameters with at most `threshold_numel` elements, so that they stay whole on
    every rank; in order, as long as they have at most `total_numel` elements together.
    """
    kept = 0
    kept_infos = []
    for p in params:
        small = p.numel <= threshold_numel and (total_numel is None or kept + p.numel <= total_numel)
        # A parameter with one element cannot be protected against writes by a stride of 0 while it is sharded.
        if small or p.numel <= 1:
            kept += p.numel
            p = replace(p, unit=None)
        kept_infos.append(p)
    return kept_infos


def assign_whole(sizes: Sequence[int], num_ranks: int) -> list[int]:
    """Returns the owner of each tensor: the largest tensors first, each to the rank with the fewest elements so far.

    No rank ends with more than an even share and one tensor. Ties go to the lower index.
    """
    loads = [0] * num_ranks
    owners = [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        owners[i] = min(range(num_ranks), key=lambda r: (loads[r], r))
        loads[owners[i]] += round_up(sizes[i], ALIGN_NUMEL)
    return owners


def plan_buckets(
    params: Sequence[ParamInfo], *, num_ranks: int | Sequence[int], owners: bool, bucket_numel: int
) -> tuple[BucketLayout, ...]:
    """Buckets in the order in which backward completes them: the reverse of registration.

    Parameters share a bucket when they have optimizer group, dtype, unit, ranks and the way they are divided
    in common. Parameters without a unit are cut by size, units are not: a module is gathered as a whole.

    Args:
        num_ranks: ranks that divide the parameters, one number for each axis.
        owners: whether states are divided; stage 0 divides nothing.
    """
    counts = [num_ranks] if isinstance(num_ranks, int) else list(num_ranks)
    classes: dict[tuple[int, str, str | None, bool, int, str], list[ParamInfo]] = {}
    for info in reversed(params):
        own = info.fqn if info.by_rows else ""
        key = (info.group, info.dtype, info.unit, info.undivided, info.axis, own)
        classes.setdefault(key, []).append(info)
    order = {info.fqn: i for i, info in enumerate(params)}
    runs: list[list[ParamInfo]] = []
    for key, members in classes.items():
        runs += [members] if key[2] is not None else split_by_size(members, bucket_numel)
    # A bucket is complete when its earliest parameter has its gradient.
    runs.sort(key=lambda run: -min(order[p.fqn] for p in run))
    owner_of = _owners(params, counts) if owners else {}
    return tuple(_bucket(i, run, counts[run[0].axis], owners, owner_of) for i, run in enumerate(runs))


def _owners(params: Sequence[ParamInfo], counts: Sequence[int]) -> dict[str, int]:
    """The owner of every undivided parameter, balanced over the ranks of its axis."""
    owners: dict[str, int] = {}
    for axis, count in enumerate(counts):
        whole = [p for p in params if p.undivided and p.axis == axis]
        owners |= {
            p.fqn: r for p, r in zip(whole, assign_whole([p.numel for p in whole], count), strict=True)
        }
    return owners


def _bucket(
    number: int, run: Sequence[ParamInfo], num_ranks: int, owners: bool, owner_of: Mapping[str, int]
) -> BucketLayout:
    first = run[0]
    name = f"{number}:{first.unit or run[-1].fqn}"
    members = list(reversed(run))
    cuts: tuple[int, ...] | None = None
    if first.undivided and owners:
        members.sort(key=lambda p: owner_of[p.fqn])  # stable: in order of registration for each owner
    slots = place(members)
    if first.undivided and owners:
        end = round_up(slots[-1].end, ALIGN_NUMEL)
        owned = [owner_of[p.fqn] for p in members]
        starts = [
            next((s.offset for s, o in zip(slots, owned, strict=True) if o >= r), end)
            for r in range(num_ranks)
        ]
        cuts = (0, *starts[1:], end)
    return BucketLayout(
        name=name,
        group=first.group,
        dtype=first.dtype,
        unit=first.unit,
        slots=slots,
        num_ranks=num_ranks,
        num_owners=num_ranks if owners else 1,
        undivided=first.undivided,
        cuts=cuts,
        axis=first.axis,
        by_rows=first.by_rows,
    )
