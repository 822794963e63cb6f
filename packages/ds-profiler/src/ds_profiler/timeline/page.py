"""The timelines of all ranks as one HTML file that needs no network: what ran when, what hid behind what, who waited
for whom, and the memory.
"""

from __future__ import annotations

import base64
import html
import json
import os
import zlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ds_profiler.files import write_whole
from ds_profiler.flops.report import seconds_text
from ds_profiler.html import style, table
from ds_profiler.timeline.analysis import RankSummary, Wait, summaries, waits
from ds_profiler.timeline.spans import Lane, RankTimeline

_LANES = tuple(Lane)


def write_page(
    ranks: Sequence[RankTimeline],
    path: str | os.PathLike[str],
    *,
    title: str = "Timeline",
    max_spans: int = 6000,
) -> None:
    """Writes the page.

    Args:
        title: heading of the page.
        max_spans: of each rank at most this many are drawn, the longest. The page says how many are left out. 6000 for
            64 ranks make a file of 3 to 4 MB.

    Raises:
        ValueError: there are no ranks, or nothing was recorded.
    """
    if not any(rank.spans for rank in ranks):
        raise ValueError("nothing was recorded: there is no span on any rank")
    write_whole(Path(path), page(ranks, title=title, max_spans=max_spans).encode())


def page(ranks: Sequence[RankTimeline], *, title: str = "Timeline", max_spans: int = 6000) -> str:
    """The page as text; see `write_page`."""
    begin = min(span.start_ns for rank in ranks for span in rank.spans)
    data = {
        "lanes": [lane.value for lane in _LANES],
        "ranks": [_drawn(rank, begin, max_spans) for rank in ranks],
    }
    packed = base64.b64encode(zlib.compress(json.dumps(data, separators=(",", ":")).encode(), 9)).decode()
    template = resources.files("ds_profiler.timeline").joinpath("page.html").read_text(encoding="utf-8")
    left_out = sum(max(0, len(rank.spans) - max_spans) for rank in ranks)
    values = {
        "STYLE": style(),
        "TITLE": html.escape(title),
        "ABOUT": html.escape(_about(ranks, left_out)),
        "SUMMARY": _summary_table(summaries(ranks)),
        "WAITS": _waits_table(waits(ranks, least_ns=1000)[:20], begin),
        "DATA": packed,
    }
    for key, value in values.items():
        template = template.replace(f"@@{key}@@", value)
    return template


def _about(ranks: Sequence[RankTimeline], left_out: int) -> str:
    hosts = len({rank.host for rank in ranks})
    error = max(rank.clock_error_ns for rank in ranks)
    text = f"{len(ranks)} rank{'s' * (len(ranks) > 1)} on {hosts} host{'s' * (hosts > 1)}, on the clock of rank 0"
    if error:
        text += f" (to within {seconds_text(error / 1e9)})"
    if left_out:
        text += f". The {left_out} shortest spans are not drawn; the tables count them"
    return text + "."


def _drawn(rank: RankTimeline, begin: int, max_spans: int) -> dict[str, Any]:
    """Names once, and for each span: lane, name, start and duration in microseconds, starts as differences."""
    spans = rank.spans
    if len(spans) > max_spans:
        shortest = sorted((span.duration_ns for span in spans), reverse=True)[max_spans - 1]
        spans = tuple(span for span in spans if span.duration_ns >= shortest)[:max_spans]
    names: dict[str, int] = {}
    flat: list[int] = []
    before = 0
    for span in spans:
        start = (span.start_ns - begin) // 1000
        number = names.setdefault(span.name, len(names))
        flat += (_LANES.index(span.lane), number, start - before, max(1, span.duration_ns // 1000))
        before = start
    return {
        "rank": rank.rank,
        "host": rank.host,
        "names": list(names),
        "spans": flat,
        "memory": [[(at - begin) // 1000, held] for at, held in thinned(rank.memory, 300)],
    }


def thinned(points: Sequence[tuple[int, int]], bins: int) -> list[tuple[int, int]]:
    """A curve with at most `bins` points, and its last one: of each part of the time the highest."""
    if len(points) <= bins:
        return list(points)
    first, last = points[0][0], points[-1][0]
    width = max(1, (last - first) // bins + 1)
    highest: dict[int, tuple[int, int]] = {}
    for point in points:
        at = (point[0] - first) // width
        if at not in highest or point[1] > highest[at][1]:
            highest[at] = point
    return [*highest.values(), points[-1]]


def _summary_table(rows: Sequence[RankSummary]) -> str:
    heads = ("rank", "recorded", "computes", "messages", "not hidden", "idle", "waited", "made others wait")
    body = []
    for row in rows:
        parts = (row.compute_ns, row.communication_ns, row.exposed_ns, row.idle_ns, row.waited_ns)
        shares = (f"{_time(part)} ({part / max(row.total_ns, 1):.0%})" for part in parts)
        body.append((str(row.rank), _time(row.total_ns), *shares, _time(row.blocked_ns)))
    return table(heads, body)


def _waits_table(rows: Sequence[Wait], begin: int) -> str:
    if not rows:
        return "<p>No collective was entered by all ranks, or none at different times.</p>"
    body = []
    for wait in rows:
        who, where = f"rank {wait.last}", html.escape(wait.name)
        body.append((_time(wait.late_ns), who, where, str(wait.number), _time(wait.start_ns - begin)))
    return table(("longest wait", "for", "in", "call", "at"), body)


def _time(ns: int) -> str:
    return seconds_text(ns / 1e9)
