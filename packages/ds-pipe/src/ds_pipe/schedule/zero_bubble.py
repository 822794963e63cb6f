"""Zero-bubble schedules: backward in two parts, the second of which fills bubbles (Qi et al. 2023, 2024).

[Note: list scheduling]
The papers draw their schedules for equal times. Here all of them come from one rule, which also takes unequal ones.
Time runs; whenever a rank is free, it starts the first possible of

1. a backward for the input, or a forward if the rank has memory for its activations: other ranks wait for both;
2. a backward for the weights, for which nobody waits, and which frees memory.

Of several possible forwards and backwards, `Preference` says which is first; all preferences are tried, and the one
whose steps are shortest is taken. What differs is the placement of stages and the number of activations that a rank may
keep. For p ranks and one stage on each, p activations give ZB-H1 and 2p - 1 give ZB-H2; for two stages on each rank in
a V, 2p give ZB-V, and fewer the variants with less memory.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from ds_pipe.actions import Action, Op
from ds_pipe.errors import ScheduleError
from ds_pipe.schedule.placement import looped, v_shaped
from ds_pipe.schedule.schedule import Schedule

Times = Sequence[tuple[float, float, float]]
"""For each stage the times of forward, backward for the input, backward for the weights."""


def zb_h1(num_ranks: int, num_microbatches: int, times: Times | None = None) -> Schedule:
    """ZB-H1: one third of the bubble of 1F1B if all times are equal, with as much memory as 1F1B's first rank needs."""
    return zero_bubble("zb-h1", looped(num_ranks), num_microbatches, max_activations=num_ranks, times=times)


def zb_h2(num_ranks: int, num_microbatches: int, times: Times | None = None) -> Schedule:
    """ZB-H2: no bubble between consecutive steps if all times are equal, with up to twice the activations of ZB-H1."""
    return zero_bubble(
        "zb-h2", looped(num_ranks), num_microbatches, max_activations=2 * num_ranks - 1, times=times
    )


def zb_v(
    num_ranks: int, num_microbatches: int, times: Times | None = None, max_activations: int | None = None
) -> Schedule:
    """ZB-V: two stages on each rank in a V; no bubble between consecutive steps, with the memory of 1F1B's first rank.

    Args:
        num_ranks: number of ranks.
        num_microbatches: number of micro-batches.
        times: times of all stages, to which the schedule is fitted. None: all are equal.
        max_activations: number of activations, each of one of the two stages, that a rank may keep. Default:
            `2 * num_ranks`. Fewer, down to 2, save memory and make bubbles.
    """
    limit = 2 * num_ranks if max_activations is None else max_activations
    name = "zb-v" if limit == 2 * num_ranks else f"zb-v-{limit}"
    return zero_bubble(name, v_shaped(num_ranks), num_microbatches, max_activations=limit, times=times)


def zero_bubble(
    name: str,
    rank_of_stage: tuple[int, ...],
    num_microbatches: int,
    *,
    max_activations: int,
    times: Times | None = None,
) -> Schedule:
    """Returns the best schedule of [Note: list scheduling].

    Args:
        name: name of the schedule.
        rank_of_stage: placement of the stages.
        num_microbatches: number of micro-batches.
        max_activations: number of activations that a rank may keep, at least as many as it has stages.
        times: times of all stages. None: all are equal.

    Raises:
        ScheduleError: `max_activations` is too small.
    """
    chunks = max(rank_of_stage.count(rank) for rank in set(rank_of_stage))
    if max_activations < chunks:
        raise ScheduleError(
            f"max_activations={max_activations}: a rank with {chunks} stages has to keep at least {chunks} activations"
        )
    times = times or [(1.0, 1.0, 1.0)] * len(rank_of_stage)
    if len(times) != len(rank_of_stage):
        raise ScheduleError(f"times of {len(times)} stages for a schedule of {len(rank_of_stage)}")

    def plan(preference: Preference, count: int) -> _Plan:
        return _Plan(rank_of_stage, count, max_activations, times, preference)

    # The beginning and the end of a step show which preference is best, whatever the number of micro-batches.
    trial = min(num_microbatches, 3 * len(set(rank_of_stage)))
    preference = min(Preference.all(), key=lambda one: plan(one, trial).run())
    best = plan(preference, num_microbatches)
    best.run()
    return Schedule(
        name=name,
        num_microbatches=num_microbatches,
        rank_of_stage=rank_of_stage,
        actions=tuple(tuple(row) for row in best.rows),
    )


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Which of several possible forwards and backwards for the input is first."""

    forward_first: bool = False
    """Forwards go before backwards."""
    earlier_first: bool = True
    """Actions of earlier stages go before those of later stages."""
    by_stage: bool = False
    """The stage is compared before the kind of action."""
    alternate: bool = False
    """What the rank has just done goes last: the same kind of action of the same stage."""

    @classmethod
    def all(cls) -> list[Preference]:
        """Returns every preference; the first is the best for equal times and a V."""
        return [
            cls(forward_first=f, earlier_first=e, by_stage=s, alternate=a)
            for a, f, e, s in itertools.product((True, False), (True, False), (True, False), (False, True))
        ]

    def key(self, op: Op, stage: int, last: tuple[Op, int] | None) -> tuple[bool, int, int]:
        """Returns the sort key of an action; the smallest is first."""
        kind = int((op is Op.FORWARD) != self.forward_first)
        order = stage if self.earlier_first else -stage
        again = self.alternate and last == (op, stage)
        return (again, order, kind) if self.by_stage else (again, kind, order)


@dataclass
class _Plan:
    """One run of the list scheduler."""

    rank_of_stage: tuple[int, ...]
    num_microbatches: int
    max_activations: int
    times: Times
    preference: Preference
    rows: list[list[Action]] = field(init=False)

    def __post_init__(self) -> None:
        ranks = max(self.rank_of_stage) + 1
        self.rows = [[] for _ in range(ranks)]
        self._stages = [[s for s, r in enumerate(self.rank_of_stage) if r == rank] for rank in range(ranks)]
        self._next = [
            dict.fromkeys((Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT), 0) for _ in self.times
        ]
        self._end: dict[tuple[Op, int, int], float] = {}
        self._kept = [0] * ranks
        self._free = [0.0] * ranks
        self._last: list[tuple[Op, int] | None] = [None] * ranks

    def run(self) -> tuple[float, float]:
        """Fills `rows`. Returns the longest time from the first to the last action of a rank, which is the time of a
        step when steps follow each other, and the end of the last action.
        """
        starts: dict[int, float] = {}
        events = [0.0]
        now = -1.0
        while events:
            if (time := heapq.heappop(events)) == now:
                continue
            now = time
            for rank in range(len(self.rows)):
                action = self._choose(rank, now) if self._free[rank] <= now else None
                if action is not None:
                    starts.setdefault(rank, now)
                    heapq.heappush(events, self._start(rank, action, now))
        expected = 3 * self.num_microbatches * len(self.times)
        assert sum(map(len, self.rows)) == expected, "the list scheduler stopped before its end"
        spans = [end - starts[rank] for rank, end in enumerate(self._free)]
        return max(spans), max(self._free)

    def _start(self, rank: int, action: Action, now: float) -> float:
        assert action.microbatch is not None
        index = (Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT).index(action.op)
        end = now + self.times[action.stage][index]
        self.rows[rank].append(action)
        self._next[action.stage][action.op] += 1
        self._end[action.op, action.stage, action.microbatch] = end
        self._kept[rank] += (1, 0, -1)[index]
        self._free[rank] = end
        self._last[rank] = (action.op, action.stage)
        return end

    def _choose(self, rank: int, now: float) -> Action | None:
        stages, last = self._stages[rank], self._last[rank]
        possible = [
            (self.preference.key(op, stage, last), op, stage)
            for op in (Op.FORWARD, Op.BACKWARD_INPUT)
            for stage in stages
            if self._ready(op, stage, now) and (op is Op.BACKWARD_INPUT or self._fits(rank, stage))
        ]
        weight = Op.BACKWARD_WEIGHT
        if possible:
            _, op, stage = min(possible, key=lambda one: one[0])
        elif ready := [s for s in stages if self._ready(weight, s, now)]:
            op, stage = weight, min(ready, key=lambda s: (self._next[s][weight], -s))
        else:
            return None
        return Action(stage, op, self._next[stage][op])

    def _ready(self, op: Op, stage: int, now: float) -> bool:
        m = self._next[stage][op]
        if m >= self.num_microbatches:
            return False
        last = len(self.times) - 1
        needs = {
            Op.FORWARD: [(Op.FORWARD, stage - 1)] if stage else [],
            Op.BACKWARD_INPUT: [
                (Op.FORWARD, stage),
                *([(Op.BACKWARD_INPUT, stage + 1)] if stage < last else []),
            ],
            Op.BACKWARD_WEIGHT: [(Op.BACKWARD_INPUT, stage)],
        }[op]
        return all(self._end.get((o, s, m), float("inf")) <= now for o, s in needs)

    def _fits(self, rank: int, stage: int) -> bool:
        # Every later stage of the rank needs one more activation for a micro-batch to come to its backward: without
        # this reserve, forwards of the first stage fill the memory and the rank waits forever.
        later = sum(s > stage for s in self._stages[rank])
        return self._kept[rank] + later < self.max_activations
