"""Plans which units to prefetch and which to keep gathered, from the order in which the previous pass ran them.

A pass is one forward of the model, or one backward. `plan` is a pure function; `Recorder` records the orders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ds_zero.config import ZeroConfig
from ds_zero.runtime.gathering.gather import LOADS_IN_FLIGHT

Kind = tuple[str | bool, ...]
"""Kind of a pass: the unit that begins it, then the modes in which it runs."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on gathered elements."""

    prefetch_numel: int | None = None
    """More units are prefetched while fewer elements than this are being prefetched. None: only the next units."""
    num_units: int = 1
    """The number of next units, if `prefetch_numel` is None."""
    max_live_numel: int | None = None
    """Maximum number of gathered elements up to which units are prefetched or kept. None: no limit."""
    max_reuse_distance_numel: int | None = None
    """A unit stays gathered if at most this number of other elements are used before it is used again. None: 0, so that
    a unit stays only if it is used twice in a row."""


def limits_of(config: ZeroConfig, *, loads: bool) -> Limits:
    """Returns the limits of a configuration.

    Args:
        loads: whether parameters are loaded from where they cannot be addressed. Then more units are prefetched, so
            that `LOADS_IN_FLIGHT` are being loaded while the one before them, which is in memory, is being gathered.
    """
    return Limits(
        prefetch_numel=config.prefetch_numel if config.prefetch else 0,
        num_units=1 + LOADS_IN_FLIGHT if loads else 1,
        max_live_numel=config.max_live_numel,
        max_reuse_distance_numel=config.max_reuse_distance_numel,
    )


@dataclass(frozen=True)
class Advice:
    """What to do when one unit runs."""

    fetch: tuple[str, ...] = ()
    """Units to start gathering now, in this order."""
    keep: bool = False
    """Whether the unit stays gathered afterwards."""


def plan(order: Sequence[str], numel_of: Mapping[str, int], limits: Limits) -> tuple[Advice, ...]:
    """Returns one advice for each position of `order`, the units of one pass in the order in which they run.

    Simulates what is gathered at each position, so that prefetched and kept units stay within `limits`. The unit that
    runs is always gathered, whatever its size.
    """
    kept = _kept(order, numel_of, limits)
    kept_numel = [0] * len(order)
    """Elements at each position that are kept from an earlier position for a later one."""
    for i, again in kept.items():
        for t in range(i + 1, again):
            kept_numel[t] += numel_of[order[i]]
    already_gathered = set(kept.values())
    ahead: set[str] = set()
    plan_of_pass: list[Advice] = []
    for i, unit in enumerate(order):
        ahead.discard(unit)
        fetch: list[str] = []
        ahead_numel = sum(numel_of[u] for u in ahead)
        most_live_numel = 0
        farthest = len(order) if limits.prefetch_numel is not None else i + 1 + limits.num_units
        for j in range(i + 1, min(farthest, len(order))):
            most_live_numel = max(most_live_numel, kept_numel[j - 1] + numel_of[order[j - 1]])
            if limits.prefetch_numel is not None and ahead_numel >= limits.prefetch_numel:
                break
            candidate = order[j]
            if candidate in ahead or candidate == unit or j in already_gathered:
                continue
            if (
                limits.max_live_numel is not None
                and most_live_numel + ahead_numel + numel_of[candidate] > limits.max_live_numel
            ):
                break
            fetch.append(candidate)
            ahead.add(candidate)
            ahead_numel += numel_of[candidate]
        plan_of_pass.append(Advice(tuple(fetch), i in kept))
    return tuple(plan_of_pass)


def _kept(order: Sequence[str], numel_of: Mapping[str, int], limits: Limits) -> dict[int, int]:
    """Returns the positions after which a unit stays gathered -> the position of its next use. Short distances have
    priority.
    """
    last: dict[str, int] = {}
    chances: list[tuple[int, int, int]] = []
    # A unit that would be prefetched as soon as it is dropped should stay instead.
    farthest = max(limits.max_reuse_distance_numel or 0, (limits.prefetch_numel or 0) - 1)
    for j, unit in enumerate(order):
        i = last.get(unit)
        if i is not None:
            between = sum(numel_of[u] for u in set(order[i + 1 : j]))
            if between <= farthest:
                chances.append((between, i, j))
        last[unit] = j
    kept_numel = [0] * len(order)
    kept: dict[int, int] = {}
    for _, i, j in sorted(chances):
        numel = numel_of[order[i]]
        if limits.max_live_numel is not None and any(
            kept_numel[t] + numel_of[order[t]] + numel > limits.max_live_numel for t in range(i + 1, j)
        ):
            continue
        kept[i] = j
        for t in range(i + 1, j):
            kept_numel[t] += numel
    return kept


_LONGEST = 100_000
"""Number of entries after which the record of a pass that has not been ended is dropped."""


class Recorder:
    """Records the order of units in each kind of pass, and returns the advice planned from the previous pass of that
    kind.

    If a backward is expected after a forward, both are planned together, so that units that the backward uses first can
    stay gathered.
    """

    def __init__(self, numel_of: Mapping[str, int], limits: Limits) -> None:
        self._numel_of, self._limits = numel_of, limits
        self._orders: dict[Kind, tuple[str, ...]] = {}
        self._plans: dict[Kind, tuple[Advice, ...]] = {}
        self._kind: Kind = ()
        self._current: list[str] = []
        self._position = -1
        """Position of the present pass in the previous order."""
        self._deviation: tuple[str, str] | None = None
        """The first (unit that ran, unit that was expected) of the present pass."""
        self._borrowed = False
        """Whether the previous order is that of another kind of pass."""

    def begin(self, kind: Kind, then: Kind | None = None) -> None:
        """Begins a pass. Drops the record of a pass that was not ended.

        Args:
            then: the kind of pass that is expected after it.
        """
        if kind == self._kind:
            return
        self.forget()
        self._kind = kind
        if kind not in self._orders:
            # The first evaluation probably runs the same units as training.
            alike = next((o for k, o in self._orders.items() if k[:1] == kind[:1]), None)
            if alike is None:
                return
            self._orders[kind], self._borrowed = alike, True
        if kind not in self._plans:
            order = self._orders[kind]
            both = (*order, *self._orders.get(then, ())) if then is not None else order
            self._plans[kind] = plan(both, self._numel_of, self._limits)[: len(order)]

    def enter(self, unit: str) -> Advice:
        """Records that `unit` runs now. Returns the advice for it."""
        if len(self._current) >= _LONGEST:
            self._current.clear()
        self._current.append(unit)
        order = self._orders.get(self._kind)
        if order is None:
            return Advice()
        expected = self._position + 1
        if expected >= len(order) or order[expected] != unit:
            if self._deviation is None:
                self._deviation = (unit, order[expected] if expected < len(order) else "")
            # A unit was skipped or inserted: continue at the next position of this unit in the previous order.
            try:
                expected = order.index(unit, expected)
            except ValueError:
                return Advice()
        self._position = expected
        plan_now = self._plans.get(self._kind)
        return plan_now[expected] if plan_now is not None else Advice()

    def end(self) -> tuple[str, str] | None:
        """Ends the pass. If its order differs from the previous one, replaces that, and returns the first (unit that
        ran, unit that was expected); "" stands for the end of the pass.
        """
        deviation = None
        old = self._orders.get(self._kind)
        if self._current and self._kind and tuple(self._current) != old:
            self._orders[self._kind] = tuple(self._current)
            self._plans.clear()
            if old is not None and not self._borrowed:
                missing = old[len(self._current)] if len(old) > len(self._current) else ""
                deviation = self._deviation or ("", missing)
        self.forget()
        return deviation

    def clear(self) -> None:
        """Drops all orders, after the buckets of units have changed."""
        self._orders.clear()
        self._plans.clear()

    def forget(self) -> None:
        """Drops the record of the present pass, such as after an exception."""
        self._current, self._position, self._deviation, self._kind = [], -1, None, ()
        self._borrowed = False
