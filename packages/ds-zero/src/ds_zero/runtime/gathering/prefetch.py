"""What to gather ahead and what to keep, planned from the order of the previous pass: a pure function, and the
recorder that feeds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ds_zero.config import ZeroConfig

Kind = tuple[str | bool, ...]
"""What kind of pass: where it begins, then the modes it runs in."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much may be gathered at once, in elements; None adapts."""

    prefetch_numel: int | None = None
    """Units are fetched ahead while fewer elements than this are on their way; None: the next unit."""
    max_live_numel: int | None = None
    """Nothing is fetched ahead or kept beyond so many gathered elements; None: no limit of its own."""
    max_reuse_distance_numel: int | None = None
    """A unit stays gathered if at most so many elements are used before it is used again; None: 0, which
    keeps what the very next unit uses again."""


def limits_of(config: ZeroConfig) -> Limits:
    """The limits that a configuration gives."""
    return Limits(
        prefetch_numel=config.prefetch_numel if config.prefetch else 0,
        max_live_numel=config.max_live_numel,
        max_reuse_distance_numel=config.max_reuse_distance_numel,
    )


@dataclass(frozen=True)
class Advice:
    """What to do while one unit runs."""

    fetch: tuple[str, ...] = ()
    """Units to start gathering now, in this order."""
    keep: bool = False
    """Whether the unit's values stay when it is done."""


def plan(order: Sequence[str], numel_of: Mapping[str, int], limits: Limits) -> tuple[Advice, ...]:
    """One advice for every position of `order`, the units of one pass in the order in which they run.

    Follows what is gathered at each position, so that advice never asks for more than `limits` allow; the unit
    that runs is always gathered, whatever its size.
    """
    kept = _kept(order, numel_of, limits)
    resting = [0] * len(order)
    """Elements that rest at each position, kept from an earlier one for a later one."""
    for i, again in kept.items():
        for t in range(i + 1, again):
            resting[t] += numel_of[order[i]]
    arrives = set(kept.values())
    ahead: set[str] = set()
    found: list[Advice] = []
    for i, unit in enumerate(order):
        ahead.discard(unit)
        fetch: list[str] = []
        under_way = sum(numel_of[u] for u in ahead)
        busiest = 0
        for j in range(i + 1, len(order) if limits.prefetch_numel is not None else min(i + 2, len(order))):
            busiest = max(busiest, resting[j - 1] + numel_of[order[j - 1]])
            if limits.prefetch_numel is not None and under_way >= limits.prefetch_numel:
                break
            coming = order[j]
            if coming in ahead or coming == unit or j in arrives:
                continue
            if (
                limits.max_live_numel is not None
                and busiest + under_way + numel_of[coming] > limits.max_live_numel
            ):
                break
            fetch.append(coming)
            ahead.add(coming)
            under_way += numel_of[coming]
        found.append(Advice(tuple(fetch), i in kept))
    return tuple(found)


def _kept(order: Sequence[str], numel_of: Mapping[str, int], limits: Limits) -> dict[int, int]:
    """Positions after which a unit stays gathered -> where it is used again; short distances first."""
    last: dict[str, int] = {}
    chances: list[tuple[int, int, int]] = []
    # What would be fetched ahead as soon as it is dropped had better stay.
    farthest = max(limits.max_reuse_distance_numel or 0, (limits.prefetch_numel or 0) - 1)
    for j, unit in enumerate(order):
        i = last.get(unit)
        if i is not None:
            between = sum(numel_of[u] for u in set(order[i + 1 : j]))
            if between <= farthest:
                chances.append((between, i, j))
        last[unit] = j
    resting = [0] * len(order)
    kept: dict[int, int] = {}
    for _, i, j in sorted(chances):
        numel = numel_of[order[i]]
        if limits.max_live_numel is not None and any(
            resting[t] + numel_of[order[t]] + numel > limits.max_live_numel for t in range(i + 1, j)
        ):
            continue
        kept[i] = j
        for t in range(i + 1, j):
            resting[t] += numel
    return kept


_LONGEST = 100_000
"""Entries after which a pass that nobody ends is forgotten."""


class Recorder:
    """Records the order of each kind of pass and gives the advice that was planned from the previous one.

    Passes are forwards, of several kinds, and backwards. A forward after which a backward is to be expected is
    planned together with the last one, so that what backward needs first can stay.
    """

    def __init__(self, numel_of: Mapping[str, int], limits: Limits) -> None:
        self._numel_of, self._limits = numel_of, limits
        self._orders: dict[Kind, tuple[str, ...]] = {}
        self._plans: dict[Kind, tuple[Advice, ...]] = {}
        self._kind: Kind = ()
        self._current: list[str] = []
        self._position = -1
        """Where in the old order the pass is."""
        self._left: tuple[str, str] | None = None
        self._borrowed = False

    def begin(self, kind: Kind, then: Kind | None = None) -> None:
        """A pass begins; one that nobody ended is forgotten.

        Args:
            then: the kind of pass that is to be expected after it.
        """
        if kind == self._kind:
            return
        self.forget()
        self._kind = kind
        if kind not in self._orders:
            # The first evaluation probably goes the way of training.
            alike = next((o for k, o in self._orders.items() if k[:1] == kind[:1]), None)
            if alike is None:
                return
            self._orders[kind], self._borrowed = alike, True
        if kind not in self._plans:
            order = self._orders[kind]
            both = (*order, *self._orders.get(then, ())) if then is not None else order
            self._plans[kind] = plan(both, self._numel_of, self._limits)[: len(order)]

    def enter(self, unit: str) -> Advice:
        """`unit` runs now."""
        if len(self._current) >= _LONGEST:
            self._current.clear()
        self._current.append(unit)
        order = self._orders.get(self._kind)
        if order is None:
            return Advice()
        expected = self._position + 1
        if expected >= len(order) or order[expected] != unit:
            if self._left is None:
                self._left = (unit, order[expected] if expected < len(order) else "")
            # A unit was skipped or put in: go on where the old order has this one next.
            try:
                expected = order.index(unit, expected)
            except ValueError:
                return Advice()
        self._position = expected
        plan_now = self._plans.get(self._kind)
        return plan_now[expected] if plan_now is not None else Advice()

    def end(self) -> tuple[str, str] | None:
        """The pass is over. If it left the order of the previous one, the first (unit that ran, unit that was
        expected) is returned, and the new order takes the place of the old one.
        """
        left = None
        old = self._orders.get(self._kind)
        if self._current and self._kind and tuple(self._current) != old:
            self._orders[self._kind] = tuple(self._current)
            self._plans.clear()
            if old is not None and not self._borrowed:
                missing = old[len(self._current)] if len(old) > len(self._current) else ""
                left = self._left or ("", missing)
        self.forget()
        return left

    def clear(self) -> None:
        """Forget every order: units have changed."""
        self._orders.clear()
        self._plans.clear()

    def forget(self) -> None:
        """The pass was broken off: nothing is learnt from it."""
        self._current, self._position, self._left, self._kind = [], -1, None, ()
        self._borrowed = False
