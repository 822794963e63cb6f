"""Chooses one option for each bucket: the solution of a linear program, rounded and improved.

Buckets of the same composition cost the same per byte, so the fractions of them that are stored in each way are the
solution of a small linear program, whose time is a lower bound. Its solution has fractions in a few ways only; the
buckets are assigned to these, and then single buckets and pairs are moved as long as the time decreases. A few large
buckets may be far from fractions: for these, the most promising partial assignments are extended bucket by bucket (beam
search), where the linear program stands for the buckets that are not assigned yet.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch

from ds_offload.budget.costs import Option
from ds_offload.budget.inputs import Room, Seconds
from ds_offload.budget.linear import minimize

_NUM_PAIRS = 2000
"""Maximum number of pairs of buckets that are tried in one round."""
_ROUNDS = 40
_BEAM_BUCKETS, _BEAM = 32, 2048
"""Maximum number of buckets for a beam search, and the number of partial assignments that are kept."""
Vector = tuple[float, ...]


@dataclass
class Search:
    """One assignment of options to buckets."""

    options: Sequence[Sequence[Option]]
    """For each bucket; buckets with the same composition have them in the same order."""
    room: Room
    compute_s: float
    _vectors: list[list[Vector]] = field(init=False)
    _chosen: list[int] = field(init=False)
    _sums: Vector = field(init=False)

    def __post_init__(self) -> None:
        self._vectors = [[option.vector() for option in of_one] for of_one in self.options]
        limits = (self.room.device_bytes, self.room.host_bytes, self.room.disk_bytes)
        self._limits = [(i, limit) for i, limit in enumerate(limits) if limit is not None]

    def run(self, below: float = math.inf) -> tuple[list[int], float] | None:
        """Returns the index of the option of each bucket, and a lower bound of the time; None if nothing fits, or all
        takes as long as `below`.
        """
        relaxed = self._relaxed()
        if relaxed is None:
            return None
        fractions, bound = relaxed
        if bound >= below:
            return None
        best: tuple[tuple[float, float], list[int]] | None = None
        starts = [self._rounded(fractions), self._smallest()]
        if 0 < len(self._vectors) <= _BEAM_BUCKETS:
            starts.append(self._beam(fractions))
        for start in starts:
            self._set(start)
            self._improve()
            value = self._value(self._sums), list(self._chosen)
            best = value if best is None or value < best else best
        assert best is not None
        (overflow, _), chosen = best
        return None if overflow > 0 else (chosen, bound)

    def _value(self, sums: Vector) -> tuple[float, float]:
        """Returns the bytes above the limits, and the time."""
        overflow = sum(max(0.0, sums[i] - limit) for i, limit in self._limits)
        return overflow, Seconds.of(sums[3:]).total(self.compute_s)

    # --- the linear program

    def _classes(self) -> dict[Vector, list[int]]:
        """Returns the buckets by composition: the bytes and seconds of each option for each byte of the bucket."""
        classes: dict[Vector, list[int]] = {}
        for index, vectors in enumerate(self._vectors):
            size = self._size(index)
            each = tuple(round(value / size, 18) for vector in vectors for value in vector)
            key = tuple(float(f"{value:.6g}") for value in each)
            classes.setdefault(key, []).append(index)
        return classes

    def _size(self, index: int) -> float:
        return max(1.0, sum(self._vectors[index][0][:3]))

    def _relaxed(self) -> tuple[dict[tuple[int, int], float], float] | None:
        """Returns (index of a class, index of an option) -> fraction of the class, and the time."""
        classes = list(self._classes().values())
        columns = [
            (c, j, tuple(sum(self._vectors[i][j][r] for i in members) for r in range(9)))
            for c, members in enumerate(classes)
            for j in range(len(self._vectors[members[0]]))
        ]
        count = len(columns)
        # Seconds may be tiny: in units of the longest they are numbers that a linear program can be solved with.
        unit = max((s for _, _, vector in columns for s in vector[3:]), default=0.0) or 1.0
        # Two more variables: the seconds of loading, and of the overlapping parts of the step.
        costs = [*(vector[8] / unit for _, _, vector in columns), 1.0, 1.0]
        at_most: list[tuple[list[float], float]] = []
        for i, most in self._limits:
            scale = 1.0 / max(most, 1)
            at_most.append(([*(v[i] * scale for _, _, v in columns), 0.0, 0.0], 1.0 if most > 0 else 0.0))
        overlapping = [(i, -1.0, 0.0, self.compute_s / unit) for i in (3, 4)]
        overlapping += [(i, 0.0, -1.0, 0.0) for i in (5, 6, 7)]
        for i, loading, stepping, limit in overlapping:
            at_most += [([*(v[i] / unit for _, _, v in columns), loading, stepping], limit)]
        equal = [
            ([*(float(c == number) for c, _, _ in columns), 0.0, 0.0], 1.0) for number in range(len(classes))
        ]
        solution = minimize(costs, at_most, equal)
        if solution is None:
            return None
        fractions = {(c, j): x for (c, j, _), x in zip(columns, solution[:count], strict=True) if x > 1e-9}
        return fractions, unit * sum(cost * x for cost, x in zip(costs, solution, strict=True))

    # --- whole buckets

    def _rounded(self, fractions: dict[tuple[int, int], float]) -> list[int]:
        """Assigns buckets, the largest first, to the option of which the largest part is not assigned yet."""
        chosen = [0] * len(self._vectors)
        for c, members in enumerate(self._classes().values()):
            total = sum(self._size(i) for i in members)
            left = {j: x * total for (of, j), x in fractions.items() if of == c}
            for i in sorted(members, key=self._size, reverse=True):
                chosen[i] = max(left, key=lambda j: left[j])
                left[chosen[i]] -= self._size(i)
        return chosen

    def _beam(self, fractions: dict[tuple[int, int], float]) -> list[int]:
        """Extends partial assignments, the largest buckets first."""
        order = sorted(range(len(self._vectors)), key=self._size, reverse=True)
        of_each = {i: torch.tensor(self._vectors[i], dtype=torch.float64) for i in order}
        rest = torch.zeros(9, dtype=torch.float64)
        average: dict[int, torch.Tensor] = {}
        for c, members in enumerate(self._classes().values()):
            for i in members:
                shares = torch.zeros(len(of_each[i]), dtype=torch.float64)
                for (of, j), x in fractions.items():
                    if of == c:
                        shares[j] = x
                average[i] = shares @ of_each[i]
                rest += average[i]
        sums = torch.zeros(1, 9, dtype=torch.float64)
        paths = torch.zeros(1, 0, dtype=torch.long)
        for i in order:
            rest = rest - average[i]
            count = len(of_each[i])
            paths = torch.cat(
                [paths.repeat_interleave(count, 0), torch.arange(count).repeat(len(paths))[:, None]], 1
            )
            sums = (sums[:, None] + of_each[i]).view(-1, 9)
            best = self._estimates(sums, rest).argsort(stable=True)[:_BEAM]
            sums, paths = sums[best], paths[best]
        chosen = [0] * len(order)
        for i, j in zip(order, paths[0].tolist(), strict=True):
            chosen[i] = j
        return chosen

    def _estimates(self, sums: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        """Returns the estimated time of partial assignments, increased for bytes above the limits."""
        whole = sums + rest
        loading = (whole[:, 3:5].amax(1) - self.compute_s).clamp(min=0)
        time = loading + whole[:, 5:8].amax(1) + whole[:, 8]
        for i, limit in self._limits:
            time = time * (1 + 4 * (whole[:, i] / max(limit, 1) - 1).clamp(min=0))
            time = torch.where(sums[:, i] > limit, torch.inf, time)
        return time

    def _smallest(self) -> list[int]:
        """Puts every bucket where it needs the least memory of the first limits."""
        return [min(range(len(vectors)), key=lambda j: vectors[j][:3]) for vectors in self._vectors]

    def _set(self, chosen: list[int]) -> None:
        self._chosen = list(chosen)
        picked = [vectors[j] for vectors, j in zip(self._vectors, chosen, strict=True)]
        self._sums = tuple(sum(column) for column in zip(*picked, strict=True)) if picked else (0.0,) * 9

    def _moved(self, sums: Vector, index: int, option: int) -> Vector:
        old, new = self._vectors[index][self._chosen[index]], self._vectors[index][option]
        return tuple(s - o + n for s, o, n in zip(sums, old, new, strict=True))

    def _improve(self) -> None:
        for _ in range(_ROUNDS):
            if not self._move_one() and not self._move_two():
                return

    def _move_one(self) -> bool:
        improved = False
        for index, vectors in enumerate(self._vectors):
            now = self._value(self._sums)
            moves = [
                (self._value(self._moved(self._sums, index, j)), j)
                for j in range(len(vectors))
                if j != self._chosen[index]
            ]
            if moves and _is_less(min(moves)[0], now):
                self._take(index, min(moves)[1])
                improved = True
        return improved

    def _move_two(self) -> bool:
        for first, second in self._pairs():
            now = self._value(self._sums)
            for j in range(len(self._vectors[first])):
                between = self._moved(self._sums, first, j)
                for k in range(len(self._vectors[second])):
                    if _is_less(self._value(self._moved(between, second, k)), now):
                        self._take(first, j)
                        self._take(second, k)
                        return True
        return False

    def _pairs(self) -> Iterator[tuple[int, int]]:
        """Yields pairs of buckets: all, or a sample of them that is the same in every run."""
        count = len(self._vectors)
        if count * (count - 1) // 2 <= _NUM_PAIRS:
            yield from combinations(range(count), 2)
            return
        generator = random.Random(count)
        for _ in range(_NUM_PAIRS // 10):
            first, second = generator.sample(range(count), 2)
            yield first, second

    def _take(self, index: int, option: int) -> None:
        self._sums = self._moved(self._sums, index, option)
        self._chosen[index] = option


def _is_less(new: tuple[float, float], old: tuple[float, float]) -> bool:
    """Whether a value is lower by more than rounding."""
    if abs(new[0] - old[0]) > 1.0:
        return new[0] < old[0]
    return new[1] < old[1] * (1 - 1e-9) - 1e-15
