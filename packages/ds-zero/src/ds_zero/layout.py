"""Who owns which element: pure arithmetic, no torch.distributed, no tensors.

Legend: a *slot* is the place of one parameter in a bucket; a *bucket* is a padded flat run of slots that is
gathered and reduced in one message; every rank owns one equal, contiguous *slice* of each bucket; a *piece*
is the part of a slot inside a slice; a rank's *partition* of an optimizer group is the concatenation of its
slices of the group's buckets.

All cuts fall on multiples of `ALIGN_NUMEL` elements, so a piece of fp32 (128 bytes) or of a 16-bit type (64
bytes) always starts on a cache line, and kernels never see a shared line or a misaligned vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

ALIGN_NUMEL = 32
FROZEN = -1
"""Group index of parameters that no optimizer group holds."""


@dataclass(frozen=True, kw_only=True)
class ParamInfo:
    """What the plan needs to know of one parameter."""

    fqn: str
    """Name of the first occurrence in `model.named_parameters()`."""
    shape: tuple[int, ...]
    dtype: str
    """Compute dtype as text, for example "torch.bfloat16"; one bucket holds one dtype."""
    group: int = FROZEN
    """Index of the optimizer group, or `FROZEN`."""
    unit: str | None = None
    """Name of the module with which a stage-3 parameter is gathered; None keeps it whole on every rank."""

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

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        return self.offset + self.numel


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
    """Ranks among which states are divided: `num_ranks`, or 1 in stage 0 where every rank owns everything."""

    @cached_property
    def padded_numel(self) -> int:
        end = self.slots[-1].end if self.slots else 0
        return round_up(end, self.num_ranks * ALIGN_NUMEL)

    @property
    def slice_numel(self) -> int:
        """Elements that one rank reduces and sends."""
        return self.padded_numel // self.num_ranks

    @property
    def owned_numel(self) -> int:
        """Elements whose master and states one rank holds."""
        return self.padded_numel // self.num_owners

    def slice_range(self, rank: int) -> tuple[int, int]:
        return rank * self.slice_numel, (rank + 1) * self.slice_numel

    def owned_range(self, rank: int) -> tuple[int, int]:
        return (0, self.padded_numel) if self.num_owners == 1 else self.slice_range(rank)

    def gaps(self) -> list[tuple[int, int]]:
        """Ranges that belong to no slot; they have to be zero wherever values are summed."""
        edges = [0, *(x for slot in self.slots for x in (slot.offset, slot.end)), self.padded_numel]
        return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a]


def round_up(n: int, multiple: int) -> int:
    """The least multiple that is not below `n`."""
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
        slots.append(Slot(fqn=info.fqn, shape=info.shape, offset=offset))
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
    """About eight buckets a model, so that reduction starts while backward still runs; between 0.25 and 32 M
    elements.
    """
    return min(max(total_numel // 8, 1 << 18), 1 << 25)


def default_persistence_numel(params: Sequence[ParamInfo]) -> int:
    """Largest threshold up to 1e5 for which the parameters kept whole are at most 2% of the model.

    A vector of a few thousand elements costs a message to gather and next to nothing to keep; but in a small
    model "small" parameters are most of it, and keeping them would undo stage 3.
    """
    total = sum(p.numel for p in params)
    kept, threshold = 0, 0
    for numel in sorted(p.numel for p in params):
        kept += numel
        if numel > 100_000 or kept * 50 > total:
            break
        threshold = numel
    # Equal sizes stand or fall together: a threshold cannot tell them apart.
    return threshold if sum(p.numel for p in params if p.numel <= threshold) * 50 <= total else 0


def keep_small_whole(params: Sequence[ParamInfo], threshold_numel: int) -> list[ParamInfo]:
    """Stage 3: parameters of at most `threshold_numel` elements lose their unit, that is, stay whole on every
    rank.
    """
    return [
        ParamInfo(fqn=p.fqn, shape=p.shape, dtype=p.dtype, group=p.group, unit=None)
        if p.numel <= threshold_numel
        else p
        for p in params
    ]


def plan_buckets(
    params: Sequence[ParamInfo], *, num_ranks: int, owners: bool, bucket_numel: int
) -> tuple[BucketLayout, ...]:
    """Buckets in the order in which backward completes them: the reverse of registration.

    Parameters share a bucket when they have optimizer group, dtype and unit in common. Parameters without a
    unit are cut by size, units are not: a module is gathered as a whole.
    """
    classes: dict[tuple[int, str, str | None], list[ParamInfo]] = {}
    for info in reversed(params):
        classes.setdefault((info.group, info.dtype, info.unit), []).append(info)
    order = {info.fqn: i for i, info in enumerate(params)}
    runs: list[list[ParamInfo]] = []
    for (_, _, unit), members in classes.items():
        runs += [members] if unit is not None else split_by_size(members, bucket_numel)
    # A bucket is complete when its earliest parameter has its gradient.
    runs.sort(key=lambda run: -min(order[p.fqn] for p in run))
    return tuple(
        BucketLayout(
            name=f"{i}:{run[0].unit or run[-1].fqn}",
            group=run[0].group,
            dtype=run[0].dtype,
            unit=run[0].unit,
            slots=place(reversed(run)),
            num_ranks=num_ranks,
            num_owners=num_ranks if owners else 1,
        )
        for i, run in enumerate(runs)
    )
