"""What every rank does when, on one clock: recording, analysis, and one page for all ranks."""

from ds_profiler.timeline.analysis import RankSummary, Wait, summaries, waits
from ds_profiler.timeline.chrome import write_chrome_trace
from ds_profiler.timeline.page import page, write_page
from ds_profiler.timeline.record import load, record, write
from ds_profiler.timeline.spans import Lane, RankTimeline, Reading, Span, read

__all__ = [
    "Lane",
    "RankSummary",
    "RankTimeline",
    "Reading",
    "Span",
    "Wait",
    "load",
    "page",
    "read",
    "record",
    "summaries",
    "waits",
    "write",
    "write_chrome_trace",
    "write_page",
]
