"""Small linear programs, by the simplex method."""

from __future__ import annotations

from collections.abc import Sequence

_EPS = 1e-9
Row = list[float]
Constraint = tuple[Sequence[float], float]
"""A row and the number that it is compared with."""


def minimize(
    costs: Sequence[float], at_most: Sequence[Constraint], equal: Sequence[Constraint]
) -> list[float] | None:
    """Returns x >= 0 that minimizes costs @ x, with row @ x <= limit for each of `at_most` and row @ x = value for each
    of `equal`; None if there is none. Limits and values must not be negative.

    Dense, with Bland's rule, for some ten rows and a hundred columns.
    """
    count, slacks = len(costs), len(at_most)
    width = count + slacks + len(equal)
    table: list[Row] = []
    basis: list[int] = []
    for i, (row, limit) in enumerate(at_most):
        assert limit >= 0, "the origin must satisfy the inequalities"
        table.append([*row, *(float(j == i) for j in range(slacks)), *(0.0 for _ in equal), limit])
        basis.append(count + i)
    for i, (row, value) in enumerate(equal):
        table.append(
            [*row, *(0.0 for _ in range(slacks)), *(float(j == i) for j in range(len(equal))), value]
        )
        basis.append(count + slacks + i)
    # First the artificial variables of the equations are made zero, then the costs are minimized.
    artificial = [float(j >= count + slacks) for j in range(width)]
    _pivot_to_optimum(table, basis, artificial, width)
    if sum(table[i][-1] for i, b in enumerate(basis) if b >= count + slacks) > 1e-7:
        return None
    _remove_artificial(table, basis, count + slacks)
    _pivot_to_optimum(table, basis, [*costs, *(0.0 for _ in range(width - count))], count + slacks)
    solution = [0.0] * width
    for i, b in enumerate(basis):
        solution[b] = table[i][-1]
    return solution[:count]


def _pivot_to_optimum(table: list[Row], basis: list[int], costs: Sequence[float], usable: int) -> None:
    """Pivots until no variable below `usable` reduces the costs."""
    while True:
        entering = next(
            (
                j
                for j in range(usable)
                if j not in basis
                and costs[j] - sum(costs[b] * row[j] for b, row in zip(basis, table, strict=True)) < -_EPS
            ),
            None,
        )
        if entering is None:
            return
        ratios = [
            (row[-1] / row[entering], basis[i], i) for i, row in enumerate(table) if row[entering] > _EPS
        ]
        assert ratios, "the costs have a lower bound"
        _pivot(table, basis, min(ratios)[2], entering)


def _remove_artificial(table: list[Row], basis: list[int], usable: int) -> None:
    """Replaces artificial variables that are zero, but in the basis, since they could grow again. A row in which only
    they occur follows from the others.
    """
    for i in reversed(range(len(table))):
        if basis[i] < usable:
            continue
        entering = next((j for j in range(usable) if abs(table[i][j]) > _EPS), None)
        if entering is None:
            del table[i], basis[i]
        else:
            _pivot(table, basis, i, entering)


def _pivot(table: list[Row], basis: list[int], leaving: int, entering: int) -> None:
    factor = table[leaving][entering]
    table[leaving] = pivot = [value / factor for value in table[leaving]]
    for i, row in enumerate(table):
        times = row[entering]
        if i != leaving and times:
            table[i] = [value - times * p for value, p in zip(row, pivot, strict=True)]
    basis[leaving] = entering
