"""What a timeline of several ranks says: how much communication is hidden, who waits for whom. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ds_profiler.timeline.spans import Lane, RankTimeline, Span

Intervals = list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class RankSummary:
    """Sums over the recorded time of one rank, in nanoseconds."""

    rank: int
    total_ns: int
    """From the first to the last span."""
    compute_ns: int
    communication_ns: int
    """At least one message is under way."""
    exposed_ns: int
    """A message is under way and nothing is computed."""
    idle_ns: int
    """Neither."""
    waited_ns: int
    """In collectives, for ranks that came later."""
    blocked_ns: int
    """Other ranks waited for this one, added over them."""


@dataclass(frozen=True, kw_only=True)
class Wait:
    """One collective whose ranks came at different times."""

    name: str
    number: int
    """The how many-th collective of that name, from 0."""
    last: int
    """The rank that came last."""
    late_ns: int
    """How much later it came than the first."""
    start_ns: int
    """When it came."""


def union(intervals: Iterable[tuple[int, int]]) -> Intervals:
    """The same set of points as intervals that do not touch, in order."""
    merged: Intervals = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > start:
            merged.append((start, end))
    return merged


def overlap(a: Intervals, b: Intervals) -> int:
    """Length of what two unions have in common."""
    total = i = j = 0
    while i < len(a) and j < len(b):
        total += max(0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


def length(intervals: Intervals) -> int:
    """Total length of a union."""
    return sum(end - start for start, end in intervals)


def waits(ranks: Sequence[RankTimeline], least_ns: int = 0) -> list[Wait]:
    """Collectives that some rank entered at least `least_ns` after the first one; the longest first.

    The k-th collective of a name on one rank is taken for the k-th on the others. Names that ranks do not have equally
    often, such as those of subgroups, are left out.
    """
    result = []
    for name, calls in _collectives(ranks).items():
        for number, starts in enumerate(zip(*calls, strict=True)):
            last = max(range(len(starts)), key=lambda i, starts=starts: starts[i])  # type: ignore[misc]
            late = starts[last] - min(starts)
            if late >= max(least_ns, 1):
                result.append(
                    Wait(name=name, number=number, last=ranks[last].rank, late_ns=late, start_ns=starts[last])
                )
    return sorted(result, key=lambda wait: -wait.late_ns)


def _collectives(ranks: Sequence[RankTimeline]) -> dict[str, list[list[int]]]:
    """Name -> for each rank the times at which it entered them; only names that all ranks have equally often."""
    if len(ranks) < 2:
        return {}
    starts: dict[str, list[list[int]]] = {}
    for index, rank in enumerate(ranks):
        for span in rank.of(Lane.COMMUNICATION):
            starts.setdefault(span.name, [[] for _ in ranks])[index].append(span.start_ns)
    return {name: calls for name, calls in starts.items() if len({len(own) for own in calls}) == 1}


def summaries(ranks: Sequence[RankTimeline]) -> list[RankSummary]:
    """A summary of each rank."""
    waited, blocked = [0] * len(ranks), [0] * len(ranks)
    for calls in _collectives(ranks).values():
        for starts in zip(*calls, strict=True):
            latest = max(starts)
            last = starts.index(latest)
            for index, start in enumerate(starts):
                waited[index] += latest - start
                blocked[last] += latest - start
    return [_summary(rank, waited[i], blocked[i]) for i, rank in enumerate(ranks)]


def _summary(rank: RankTimeline, waited: int, blocked: int) -> RankSummary:
    compute = union(_bounds(rank.of(Lane.COMPUTE)))
    messages = union(_bounds(rank.of(Lane.COMMUNICATION)))
    all_of = union([*compute, *messages])
    total = max((s.end_ns for s in rank.spans), default=0) - min((s.start_ns for s in rank.spans), default=0)
    return RankSummary(
        rank=rank.rank,
        total_ns=total,
        compute_ns=length(compute),
        communication_ns=length(messages),
        exposed_ns=length(messages) - overlap(messages, compute),
        idle_ns=total - length(all_of),
        waited_ns=waited,
        blocked_ns=blocked,
    )


def _bounds(spans: Iterable[Span]) -> Intervals:
    return [(span.start_ns, span.end_ns) for span in spans]
