"""Few rows that contain every pair of settings: for matrices that are too large to run whole on every change."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def covering(
    factors: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool] = lambda row: True
) -> list[Row]:
    """Rows such that every pair of values of two factors is in one of them, wherever a whole allowed row can hold it.

    Greedy and deterministic: each row starts from the first pair that is missing, then takes factor by factor the
    value that covers most missing pairs, the first of equals. `allowed` is asked about partial rows too, and must
    not refuse one that a whole row could make good.
    """
    names = list(factors)
    missing = {
        (a, x, b, y): None
        for a, b in itertools.combinations(range(len(names)), 2)
        for x in range(len(factors[names[a]]))
        for y in range(len(factors[names[b]]))
    }
    rows: list[Row] = []
    while missing:
        a, x, b, y = next(iter(missing))
        chosen = _fill({a: x, b: y}, names, factors, missing, allowed)
        if chosen is None:
            del missing[a, x, b, y]  # no allowed row has it
            continue
        for pair in itertools.combinations(sorted(chosen.items()), 2):
            (i, u), (j, v) = pair
            missing.pop((i, u, j, v), None)
        rows.append({names[i]: factors[names[i]][v] for i, v in sorted(chosen.items())})
    return rows


def _fill(
    chosen: dict[int, int],
    names: Sequence[str],
    factors: Mapping[str, Sequence[Any]],
    missing: Mapping[tuple[int, int, int, int], None],
    allowed: Callable[[Row], bool],
) -> dict[int, int] | None:
    """The best way to complete a row, or None if there is none that is allowed."""

    def as_row(some: Mapping[int, int]) -> Row:
        return {names[i]: factors[names[i]][v] for i, v in some.items()}

    if not allowed(as_row(chosen)):
        return None
    rest = [i for i in range(len(names)) if i not in chosen]
    if not rest:
        return chosen

    def gain(i: int, v: int) -> int:
        pairs = ((min((j, w), (i, v)), max((j, w), (i, v))) for j, w in chosen.items())
        return sum((*first, *second) in missing for first, second in pairs)

    i = max(rest, key=lambda i: (max(gain(i, v) for v in range(len(factors[names[i]]))), -i))
    for v in sorted(range(len(factors[names[i]])), key=lambda v: (-gain(i, v), v)):
        found = _fill({**chosen, i: v}, names, factors, missing, allowed)
        if found is not None:
            return found
    return None


def uncovered(
    rows: Sequence[Row], factors: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool]
) -> list[tuple[str, Any, str, Any]]:
    """Pairs that an allowed row has and `rows` lack, found by looking at every row there is."""
    have = {(a, row[a], b, row[b]) for row in rows for a, b in itertools.combinations(factors, 2)}
    wanted: dict[tuple[str, Any, str, Any], None] = {}
    for values in itertools.product(*factors.values()):
        row = dict(zip(factors, values, strict=True))
        if allowed(row):
            wanted |= dict.fromkeys((a, row[a], b, row[b]) for a, b in itertools.combinations(factors, 2))
    return [pair for pair in wanted if pair not in have]
