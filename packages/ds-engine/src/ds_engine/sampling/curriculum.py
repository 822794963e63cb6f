"""Curriculum learning: draws samples whose difficulty is below limits that grow with the steps.

[Note: clusters]
At each step, the samples whose difficulty is within the limit of every measure are eligible. The samples that become
eligible at the same step form a cluster. A batch is drawn from all clusters in proportion to their sizes. Within a
cluster the samples are drawn in a computed order ([Note: computed order]), each once before any is drawn again. So a
batch depends only on the seed, the step, and the number of samples drawn from each cluster. A checkpoint contains
these, and every rank computes the same batch without communication. Eligible samples stay eligible, even if a limit
decreases again (a custom schedule).

Source: Li et al., DeepSpeed Data Efficiency (AAAI 2024), section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ds_engine.sampling.index import MetricIndex
from ds_engine.sampling.shuffle import draws, key_of, shuffled

Difficulty = Callable[[int], float]
"""Step, counted from 1 -> difficulty."""


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One measure, and the schedule of its bound."""

    difficulty: Difficulty | None
    """None: must be set by `set_difficulties` before the first batch."""
    most: float
    """For percentiles, the difficulty at which all samples are eligible."""
    kind: Literal["value", "percentile"] = "value"
    index: MetricIndex | None = None
    """None: the measure restricts nothing; its difficulty is only reported."""

    def count(self, difficulty: float) -> int:
        """Returns the number of samples, in the order of the index, that are easy enough."""
        assert self.index is not None
        if self.kind == "value":
            return self.index.below(difficulty)
        return min(int(len(self.index) * difficulty // self.most), len(self.index))

    def easy(self, difficulty: float) -> NDArray[np.bool_]:
        """Returns for each sample whether it is easy enough."""
        assert self.index is not None
        flags = np.zeros(len(self.index), dtype=np.bool_)
        flags[self.index.order[: self.count(difficulty)]] = True
        return flags


@dataclass
class _Cluster:
    """Samples that became eligible together."""

    number: int
    begin: int
    size: int
    members: NDArray[Any] | None
    """The samples, from `begin` on; None: the indices of the samples themselves."""
    position: int = 0
    """Number of samples that were drawn from it."""

    def take(self, count: int, seed: int) -> NDArray[np.int64]:
        places = self.position + np.arange(count, dtype=np.int64)
        self.position += count
        drawn = np.empty(count, dtype=np.int64)
        passes = places // self.size
        for turn in np.unique(passes):
            mine = passes == turn
            key = key_of(seed, self.number, int(turn))
            drawn[mine] = self.begin + shuffled(places[mine] % self.size, self.size, key)
        return drawn if self.members is None else self.members[drawn].astype(np.int64)


@dataclass(frozen=True)
class _Mark:
    """The state from which a batch is computed."""

    difficulties: Mapping[str, float] = field(default_factory=dict)
    """Difficulties at the previous step; empty before the first."""
    clusters: tuple[Mapping[str, float], ...] = ()
    """Difficulties at which each cluster was created."""
    positions: tuple[int, ...] = ()
    """Number of samples that were drawn from each cluster."""


class CurriculumOrder:
    """Yields the indices of this rank's micro-batches. An optimizer step, which is also a step of the curriculum, has
    `batch` samples on any number of ranks: rank r of W gets the micro-batches k W + r. A `batch_sampler` of torch's
    `DataLoader`.
    """

    goes_on = True

    def __init__(
        self,
        num_samples: int,
        criteria: Mapping[str, Criterion],
        *,
        batch: int,
        micro_batch: int,
        rank: int = 0,
        ranks: int = 1,
        seed: int = 0,
        passes: int = 1000,
    ) -> None:
        """
        Args:
            batch: number of samples per optimizer step over all ranks; a multiple of `micro_batch` x `ranks`.
            passes: it ends after `passes` x `num_samples` samples.

        Raises:
            ValueError: an index has another number of samples.
        """
        self.num_samples, self._criteria = num_samples, dict(criteria)
        self.batch, self.micro_batch, self.rank, self.ranks, self.seed = batch, micro_batch, rank, ranks, seed
        self._passes = passes
        self.epoch = self.start = 0
        for name, criterion in self._criteria.items():
            if criterion.index is not None and len(criterion.index) != num_samples:
                raise ValueError(
                    f"the index of {name!r} in {criterion.index.path} has {len(criterion.index)} samples, but "
                    f"training_data has {num_samples}: run the Analyzer again on this data"
                )
        if not self.total:
            raise ValueError(
                f"{num_samples} samples are fewer than a batch of {batch}: lower train_batch_size"
            )
        self._eligible: NDArray[np.bool_] | None = None
        """With several measures: for each sample whether it is in a cluster."""
        self._count = 0
        """With one measure: number of samples, in its order, that are in clusters."""
        self._clusters: list[_Cluster] = []
        self._now = _Mark()
        self._marks: dict[int, _Mark] = {0: _Mark()}
        self._next = 0
        """Number of the batch that `_now` is before."""

    @property
    def together(self) -> int:
        return self.micro_batch * self.ranks

    @property
    def total(self) -> int:
        return self.num_samples * self._passes // self.batch * self.batch

    def __len__(self) -> int:
        return (self.total - self.start) // self.together

    def set_difficulties(self, functions: Mapping[str, Difficulty]) -> None:
        """Sets the schedules of measures with `"schedule_type": "custom"`: name of a measure -> function of the step.

        Raises:
            ValueError: there is no measure of that name.
        """
        for name, function in functions.items():
            if name not in self._criteria:
                raise ValueError(f"there is no measure {name!r}, only {sorted(self._criteria)}")
            old = self._criteria[name]
            self._criteria[name] = Criterion(
                difficulty=function, most=old.most, kind=old.kind, index=old.index
            )

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self.start // self.batch, self.total // self.batch):
            self._go_to(number)
            samples = self._draw()
            seen = max(0, self.start - number * self.batch)
            for first in range(seen + self.rank * self.micro_batch, self.batch, self.together):
                yield samples[first : first + self.micro_batch].tolist()

    # --- batches

    def _go_to(self, number: int) -> None:
        """Moves to the state before batch `number`."""
        if self._next == number:
            return
        if number not in self._marks:
            nearest = max((n for n in self._marks if n < number), default=None)
            if nearest is None:
                raise ValueError(f"the state before batch {number} is unknown: load it first")
            self._restore(self._marks[nearest], nearest)
            while self._next < number:
                self._draw()
            return
        self._restore(self._marks[number], number)

    def _restore(self, mark: _Mark, number: int) -> None:
        self._clusters, self._eligible, self._count = [], None, 0
        for difficulties, position in zip(mark.clusters, mark.positions, strict=True):
            self._make_cluster(difficulties)
            self._clusters[-1].position = position
        self._now, self._next = mark, number

    def _draw(self) -> NDArray[np.int64]:
        """Returns the samples of the next batch, in order."""
        step = self._next + 1
        now = self._difficulties(step)
        clusters = self._now.clusters
        if now != self._now.difficulties:
            if self._make_cluster(now):
                clusters = (*clusters, now)
            if not self._clusters:
                raise ValueError(self._nothing_eligible(now))
        edges = np.cumsum([c.size for c in self._clusters])
        where = np.searchsorted(
            edges, draws(key_of(self.seed, -1, step), self.batch, int(edges[-1])), side="right"
        )
        samples = np.empty(self.batch, dtype=np.int64)
        for number, cluster in enumerate(self._clusters):
            mine = where == number
            if mine.any():
                samples[mine] = cluster.take(int(mine.sum()), self.seed)
        self._now, self._next = _Mark(now, clusters, tuple(c.position for c in self._clusters)), step
        self._marks[step] = self._now
        return samples

    def _difficulties(self, step: int) -> dict[str, float]:
        difficulties = {}
        for name, criterion in self._criteria.items():
            if criterion.difficulty is None:
                raise ValueError(
                    f'the schedule of {name!r} is "custom": set its function with '
                    f"loader.set_difficulties({{{name!r}: lambda step: ...}}) before the first batch"
                )
            difficulties[name] = criterion.difficulty(step)
        return difficulties

    def _restricting(self) -> dict[str, Criterion]:
        return {name: c for name, c in self._criteria.items() if c.index is not None}

    def _make_cluster(self, difficulties: Mapping[str, float]) -> bool:
        """Creates a cluster of the samples that have become eligible. Returns whether there are any."""
        restricting = self._restricting()
        begin, members = 0, None
        if not restricting:
            size = 0 if self._clusters else self.num_samples
        elif len(restricting) == 1:
            ((name, only),) = restricting.items()
            begin = self._count
            self._count = max(self._count, only.count(difficulties[name]))
            size = self._count - begin
            assert only.index is not None
            members = only.index.order
        else:
            easy = np.ones(self.num_samples, dtype=np.bool_)
            for name, criterion in restricting.items():
                easy &= criterion.easy(difficulties[name])
            before = self._eligible if self._eligible is not None else np.zeros_like(easy)
            members = np.flatnonzero(easy & ~before)
            self._eligible, size = before | easy, len(members)
        if size:
            self._clusters.append(_Cluster(len(self._clusters), begin, size, members))
        return size > 0

    def _nothing_eligible(self, now: Mapping[str, float]) -> str:
        least = {
            name: c.index.least
            for name, c in self._restricting().items()
            if c.kind == "value" and c.index is not None
        }
        return (
            f"no sample is easy enough at step {self._next + 1}, where the difficulties are {dict(now)}; the least in "
            f"the data are {least}: raise min_difficulty"
        )

    # --- positions

    def samples_at(self, position: int) -> None:
        return None

    def told(self, position: int) -> Mapping[str, Any]:
        """Returns the difficulties of the batch that contains the sample at `position`."""
        mark = self._marks.get(position // self.batch + 1)
        return {"current_difficulties": dict(mark.difficulties) if mark is not None else {}}

    def passed(self, position: int) -> None:
        """Discards the history before `position`."""
        for old in [n for n in self._marks if n < position // self.batch]:
            del self._marks[old]

    def state_dict(self, position: int) -> dict[str, Any]:
        """Returns the state from which the batch at `position` is computed."""
        number = position // self.batch
        mark = self._marks[number]
        return {
            "order": "curriculum",
            "seed": self.seed,
            "batch": self.batch,
            "number": number,
            "difficulties": dict(mark.difficulties),
            "clusters": [dict(c) for c in mark.clusters],
            "positions": list(mark.positions),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("order") != "curriculum" or state.get("batch") != self.batch:
            raise ValueError(
                f"samples were drawn in order {state.get('order')!r} for batches of {state.get('batch')}, here it is "
                f"'curriculum' for batches of {self.batch}"
            )
        names = set(state["difficulties"])
        if names and names != set(self._criteria):
            raise ValueError(f"samples were chosen by {sorted(names)}, here by {sorted(self._criteria)}")
        self.seed = state["seed"]
        mark = _Mark(dict(state["difficulties"]), tuple(state["clusters"]), tuple(state["positions"]))
        self._marks = {state["number"]: mark}
        self._restore(mark, state["number"])
