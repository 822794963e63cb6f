"""The timelines of all ranks as one trace for Perfetto (ui.perfetto.dev) and chrome://tracing."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_profiler.files import write_whole
from ds_profiler.timeline.spans import Lane, RankTimeline

_THREADS: Mapping[Lane, int] = {lane: number for number, lane in enumerate(Lane)}


def write_chrome_trace(ranks: Sequence[RankTimeline], path: str | os.PathLike[str]) -> None:
    """Writes a trace with a process for each rank and a thread for each lane. Compressed if the name ends in .gz."""
    text = json.dumps({"traceEvents": list(_events(ranks)), "displayTimeUnit": "ms"}).encode()
    target = Path(path)
    write_whole(target, gzip.compress(text, 6) if target.suffix == ".gz" else text)


def _events(ranks: Sequence[RankTimeline]) -> Iterator[dict[str, Any]]:
    for rank in ranks:
        own = {"pid": rank.rank, "ph": "M"}
        yield {**own, "name": "process_name", "args": {"name": f"rank {rank.rank} ({rank.host})"}}
        yield {**own, "name": "process_sort_index", "args": {"sort_index": rank.rank}}
        for lane, thread in _THREADS.items():
            yield {**own, "tid": thread, "name": "thread_name", "args": {"name": lane.value}}
        for span in rank.spans:
            yield {
                "ph": "X",
                "pid": rank.rank,
                "tid": _THREADS[span.lane],
                "cat": span.lane.value,
                "name": span.name,
                "ts": span.start_ns / 1e3,
                "dur": span.duration_ns / 1e3,
            }
        for at, held in rank.memory:
            yield {"ph": "C", "pid": rank.rank, "name": "allocated", "ts": at / 1e3, "args": {"bytes": held}}
