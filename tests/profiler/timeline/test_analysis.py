"""Sums over a timeline that was drawn by hand."""

from __future__ import annotations

import random

from ds_profiler.timeline import Lane, RankTimeline, Span, summaries, waits
from ds_profiler.timeline.analysis import length, overlap, union


def rank(number, *spans):
    ordered = sorted((Span(*span) for span in spans), key=lambda s: s.start_ns)
    return RankTimeline(rank=number, host="host", spans=tuple(ordered))


COMPUTE, MESSAGE, PHASE = Lane.COMPUTE, Lane.COMMUNICATION, Lane.PHASE


def test_a_message_is_hidden_where_something_is_computed():
    (row,) = summaries(
        [
            rank(
                0,
                ("forward", PHASE, 0, 100),
                ("mm", COMPUTE, 0, 40),
                ("mm", COMPUTE, 30, 50),  # on another thread
                ("reduce", MESSAGE, 45, 70),
                ("gather", MESSAGE, 60, 80),
            )
        ]
    )
    assert (row.total_ns, row.compute_ns, row.communication_ns) == (100, 50, 35)
    assert (row.exposed_ns, row.idle_ns) == (30, 20)
    assert (row.waited_ns, row.blocked_ns) == (0, 0)


def test_the_rank_that_comes_last_is_named():
    ranks = [
        rank(0, ("reduce", MESSAGE, 10, 50), ("reduce", MESSAGE, 60, 70), ("only here", MESSAGE, 90, 99)),
        rank(1, ("reduce", MESSAGE, 40, 50), ("reduce", MESSAGE, 61, 70)),
        rank(2, ("reduce", MESSAGE, 12, 50), ("reduce", MESSAGE, 60, 70)),
    ]
    first, second = waits(ranks)
    assert (first.name, first.number, first.last, first.late_ns, first.start_ns) == ("reduce", 0, 1, 30, 40)
    assert (second.number, second.late_ns) == (1, 1)
    assert waits(ranks, least_ns=2) == [first]
    rows = summaries(ranks)
    assert [row.waited_ns for row in rows] == [31, 0, 29]
    assert [row.blocked_ns for row in rows] == [0, 60, 0]
    assert waits(ranks[:1]) == []


def test_unions_and_overlaps_against_sets_of_points():
    draw = random.Random(0)
    for _ in range(200):
        a, b = (
            [(s, s + draw.randrange(6)) for s in (draw.randrange(40) for _ in range(draw.randrange(8)))]
            for _ in "ab"
        )
        points = [{p for start, end in x for p in range(start, end)} for x in (a, b)]
        assert length(union(a)) == len(points[0])
        assert overlap(union(a), union(b)) == len(points[0] & points[1])
