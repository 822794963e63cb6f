"""Plans where the state of a rank is stored, within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from ds_offload.budget.costs import options, undo_bytes
from ds_offload.budget.inputs import KINDS, BucketBytes, Choice, Rates, Room, Seconds, Work
from ds_offload.budget.search import Search
from ds_offload.interfaces import Tier
from ds_offload.tiers import TiersByName

TIERS: tuple[Tier, ...] = ("device", "host", "disk")
STAGED = 3
"""Tensors of each kind that are in memory at a time if the kind is on a disk (ds_zero's staging buffers)."""
PAGE_BYTES, NUM_PAGES = 64 << 20, 4
"""Memory into which a `PagedOptimizer` loads states."""


DEFAULT_RATES, DEFAULT_WORK = Rates(), Work()


class BudgetError(ValueError):
    """The state of a rank does not fit into its budget."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where each tensor of a rank is stored, and what that costs."""

    buckets: Sequence[BucketBytes]
    choices: Sequence[Choice]
    """For each bucket."""
    room: Room
    seconds: Seconds
    step_s: float
    """Predicted seconds of a step, apart from forwards and backwards."""
    bound_s: float
    """No placement takes less time, even if buckets could be divided."""
    buffer_bytes: int
    """Host memory for buffers of what is on the disk."""
    undo_bytes: Mapping[Tier, int] = field(default_factory=dict)
    """Bytes of each tier for second versions of what a step changes during the backward."""
    reserve_bytes: int = 0
    """Host memory that the training needs besides."""

    @property
    def tiers(self) -> TiersByName:
        """The function for stores and plans."""
        return TiersByName(
            tiers={b.name: dict(c.tiers) for b, c in zip(self.buckets, self.choices, strict=True)}
        )

    def num_bytes(self, tier: Tier, kind: str | None = None) -> int:
        """Returns the bytes of one kind, or of all, in a tier, without buffers."""
        return sum(
            size
            for bucket, choice in zip(self.buckets, self.choices, strict=True)
            for name, size in bucket.kinds.items()
            if choice.of(name) == tier and kind in (None, name)
        )

    def kinds(self, tier: Tier) -> frozenset[str]:
        """Returns the kinds of which at least one tensor is in a tier."""
        return frozenset(kind for kind in KINDS if self.num_bytes(tier, kind))

    def rows(self) -> list[list[str]]:
        """Returns a header, a row for each kind, and the sums beside the limits."""
        rows = [["", *TIERS]]
        for kind in KINDS:
            sizes = [self.num_bytes(tier, kind) for tier in TIERS]
            if any(sizes):
                rows.append([_NAMES[kind], *(human(size) if size else "-" for size in sizes)])
        if self.buffer_bytes:
            rows.append(["buffers", "-", human(self.buffer_bytes), "-"])
        undo = [self.undo_bytes.get(tier, 0) for tier in TIERS]
        if any(undo):
            rows.append(["to take steps back", *(human(size) if size else "-" for size in undo)])
        if self.reserve_bytes:
            rows.append(["activations", "-", human(self.reserve_bytes), "-"])
        used = [self.num_bytes(tier) + size for tier, size in zip(TIERS, undo, strict=True)]
        used[1] += self.buffer_bytes + self.reserve_bytes
        limits = [self.room.device_bytes, self.room.host_bytes, self.room.disk_bytes]
        rows.append(["in all", *map(human, used)])
        rows.append(["budget", *("no limit" if limit is None else human(limit) for limit in limits)])
        return rows

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = []
        for name, *cells in rows:
            aligned = [cell.rjust(w) for cell, w in zip(cells, widths[1:], strict=True)]
            lines.append("  ".join([name.ljust(widths[0]), *aligned]))
        s = self.seconds
        busy = {
            "update on the host": s.host,
            "link": s.link,
            "disk": s.disk,
            "update on the device": s.device,
            "loading of parameters": max(s.load_link, s.load_disk),
        }
        parts = ", ".join(f"{name} {_time(value)}" for name, value in busy.items() if value)
        return "\n".join([*lines, f"predicted: {_time(self.step_s)} a step ({parts or 'nothing to do'})"])


_NAMES: Mapping[str, str] = {
    "param": "parameters",
    "master": "masters",
    "grad": "gradients",
    "state": "optimizer states",
}


def place(
    buckets: Sequence[BucketBytes], room: Room, rates: Rates = DEFAULT_RATES, work: Work = DEFAULT_WORK
) -> Placed:
    """Decides where the tensors of each bucket are stored, so that they fit and the predicted step is the fastest.

    Pure: equal arguments give equal results on every rank and in every run. The disk is used only if device and host
    are too small.

    Raises:
        BudgetError: they do not fit; the message has the numbers and what would be enough.
    """
    placed = _placed(buckets, room, rates, work)
    if placed is None:
        raise BudgetError(_refusal(buckets, room, rates, work))
    return placed


def _placed(buckets: Sequence[BucketBytes], room: Room, rates: Rates, work: Work) -> Placed | None:
    best: Placed | None = None
    for disk in disk_kinds(buckets, room, work):
        if best is not None and not best.kinds("disk"):
            break  # without a disk it is faster than with one
        buffers = buffer_bytes(buckets, disk)
        log = _undo_reserve(buckets, work)
        inside = room.without(log, log + buffers + work.host_reserve_bytes)
        if inside is None:
            continue
        of_each = [options(bucket, rates, work, disk) for bucket in buckets]
        found = Search(of_each, inside, work.compute_s).run(math.inf if best is None else best.step_s)
        if found is None:
            continue
        chosen, bound = found
        picked = [of_one[j] for of_one, j in zip(of_each, chosen, strict=True)]
        sums = [0.0] * 9
        for option in picked:
            sums = [s + value for s, value in zip(sums, option.vector(), strict=True)]
        seconds = Seconds.of(sums[3:])
        step_s = seconds.total(work.compute_s)
        if best is None or step_s < best.step_s:
            best = Placed(
                buckets=buckets,
                choices=[option.choice for option in picked],
                room=room,
                seconds=seconds,
                step_s=step_s,
                bound_s=bound if best is None else min(bound, best.bound_s),
                buffer_bytes=buffers,
                undo_bytes=_undo_of(buckets, [option.choice for option in picked], work),
                reserve_bytes=work.host_reserve_bytes,
            )
    return best


def _undo_reserve(buckets: Sequence[BucketBytes], work: Work) -> int:
    """Returns the bytes that are set apart for second versions if their memory is limited."""
    if work.undo_limit_bytes is None:
        return 0
    return min(work.undo_limit_bytes, sum(sum(bucket.undo.values()) for bucket in buckets))


def _undo_of(buckets: Sequence[BucketBytes], choices: Sequence[Choice], work: Work) -> dict[Tier, int]:
    reserve = _undo_reserve(buckets, work)
    total: dict[Tier, int] = {"device": reserve, "host": reserve, "disk": 0}
    for bucket, choice in zip(buckets, choices, strict=True):
        for tier, size in undo_bytes(bucket, choice.tiers, work).items():
            total[tier] += size
    return total


def disk_kinds(buckets: Sequence[BucketBytes], room: Room, work: Work) -> list[frozenset[str]]:
    """Returns the sets of kinds that may be on a disk, each of which needs its own buffers; first the empty one."""
    present = [kind for kind in KINDS if any(kind in bucket.kinds for bucket in buckets)]
    if not work.pages_states:
        present = [kind for kind in present if kind not in ("master", "state")]
    if room.disk_bytes == 0:
        present = []
    sets = [frozenset(some) for count in range(len(present) + 1) for some in combinations(present, count)]
    # States are with their masters, or on the disk while these are in host memory.
    return [some for some in sets if "master" not in some or "state" in some or "state" not in present]


def buffer_bytes(buckets: Sequence[BucketBytes], disk: Collection[str]) -> int:
    """Returns the host memory of buffers if these kinds are on a disk, at least in part."""
    total = 0
    for kind in disk:
        sizes = sorted((bucket.kinds.get(kind, 0) for bucket in buckets), reverse=True)
        if not sizes or not sizes[0]:
            continue
        if kind == "state":
            # Buckets whose masters are in memory are stepped together, and pages contain the states of several.
            parts = sizes if "master" in disk else [sum(sizes)]
            pages = sum(-(-part // PAGE_BYTES) for part in parts)
            total += min(NUM_PAGES, pages) * min(PAGE_BYTES, max(parts))
        else:
            total += min(STAGED, sum(1 for size in sizes if size)) * sizes[0]
    return total


# --- refusals


def _refusal(buckets: Sequence[BucketBytes], room: Room, rates: Rates, work: Work) -> str:
    total = sum(size for bucket in buckets for size in bucket.kinds.values())
    limits = {"device": room.device_bytes, "host": room.host_bytes, "disk": room.disk_bytes}
    given = ", ".join(
        f"{name} {'no limit' if limit is None else human(limit)}" for name, limit in limits.items()
    )
    kinds = ", ".join(
        f"{_NAMES[kind]} {human(size)}"
        for kind in KINDS
        if (size := sum(bucket.kinds.get(kind, 0) for bucket in buckets))
    )
    text = f"the state of a rank takes {human(total)} ({kinds}), which does not fit into its budget ({given})"
    buffers = max(buffer_bytes(buckets, disk) for disk in disk_kinds(buckets, room, work))
    undo = sum(sum(bucket.undo.values()) for bucket in buckets)
    if undo:
        text += f"; overlap_step keeps up to {human(undo)} to take steps back"
    if work.host_reserve_bytes:
        text += f"; activations take {human(work.host_reserve_bytes)} of host memory"
    if buffers:
        text += f"; what is on a disk needs up to {human(buffers)} of host memory for buffers"
    remedies = []
    for name, limit in (("device", "device_bytes"), ("host", "host_bytes"), ("disk", "disk_bytes")):
        if limits[name] is None:
            continue

        def fits(size: int, limit: str = limit) -> bool:
            return _placed(buckets, replace(room, **{limit: size}), rates, work) is not None

        enough = _least(limits[name] or 0, total + buffers + 2 * undo + work.host_reserve_bytes, fits)
        if enough is not None:
            remedies.append(f"{name} {human(enough)}")
    if not remedies:
        return f"{text}. No single limit is enough: raise several of them, use more ranks, or a higher stage"
    return f"{text}. Enough would be one of: {', '.join(remedies)}; or use more ranks, or a higher stage"


def _least(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """Returns the smallest size above `low`, to a hundredth, that fits; None if `high` does not."""
    if not fits(high):
        return None
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def human(num_bytes: float) -> str:
    """Formats bytes in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
