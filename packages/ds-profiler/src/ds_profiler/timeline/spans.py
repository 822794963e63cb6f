"""The timeline of a rank as a value, made from a trace of torch's profiler."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Lane(str, Enum):
    """The row of a rank in which a span is drawn."""

    PHASE = "phase"
    """What the training loop does: forward, backward, step."""
    COMPUTE = "compute"
    """Operations: kernels of an accelerator, or on a CPU the outermost operations of its threads."""
    COMMUNICATION = "communication"
    """Collectives and messages while they are under way."""
    RANGE = "range"
    """Other named ranges, of the packages or of the user (`torch.profiler.record_function`)."""


@dataclass(frozen=True)
class Span:
    """Something that takes time."""

    name: str
    lane: Lane
    start_ns: int
    """Nanoseconds since the epoch, by the clock of rank 0."""
    end_ns: int

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns


@dataclass(frozen=True, kw_only=True)
class RankTimeline:
    """All of one rank."""

    rank: int
    host: str
    spans: tuple[Span, ...]
    """Ordered by their start."""
    memory: tuple[tuple[int, int], ...] = ()
    """(ns, bytes allocated by torch), wherever it changed; on a machine with an accelerator, the accelerator's."""
    clock_error_ns: int = 0
    """The clock of this rank may differ from that of rank 0 by this much after its correction."""

    def of(self, lane: Lane) -> tuple[Span, ...]:
        return tuple(span for span in self.spans if span.lane is lane)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` is the inverse."""
        return {
            "rank": self.rank,
            "host": self.host,
            "clock_error_ns": self.clock_error_ns,
            "spans": [[s.name, s.lane.value, s.start_ns, s.end_ns] for s in self.spans],
            "memory": [list(point) for point in self.memory],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RankTimeline:
        return cls(
            rank=data["rank"],
            host=data["host"],
            clock_error_ns=data["clock_error_ns"],
            spans=tuple(Span(name, Lane(lane), start, end) for name, lane, start, end in data["spans"]),
            memory=tuple((at, held) for at, held in data["memory"]),
        )


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the events of a trace are sorted into lanes."""

    phases: tuple[str, ...] = ("ds.engine.",)
    """Beginnings of the names of ranges that are phases."""
    messages: tuple[str, ...] = (
        *("gloo:", "nccl:", "mpi:", "ucc:", "xccl:"),
        *("ds.zero.all_gather", "ds.zero.reduce", "ds.moe.all_to_all"),
    )
    """Beginnings of the names of ranges that are communication."""
    gap_ns: int = 20_000
    """Operations with smaller gaps between them are drawn as one."""
    clock_offset_ns: int = 0
    """Added to every time: from the clock of this rank to that of rank 0."""
    clock_error_ns: int = 0
    """The uncertainty of that."""


_DEVICE_WORK = frozenset(("kernel", "gpu_memcpy", "gpu_memset"))
_Interval = tuple[int, int, str]


def read(trace: Mapping[str, Any], rank: int, host: str, how: Reading | None = None) -> RankTimeline:
    """The timeline of a rank from its trace, as `torch.profiler.profile.export_chrome_trace` writes it."""
    how = how or Reading()
    base = int(trace.get("baseTimeNanoseconds", 0)) + how.clock_offset_ns
    events: Sequence[Mapping[str, Any]] = trace["traceEvents"]
    on_device = any(event.get("cat") in _DEVICE_WORK for event in events)
    spans: list[Span] = []
    # By thread or stream: the operations, and the messages, whose own copies are no computation.
    operations: dict[Any, list[_Interval]] = {}
    messages: dict[Any, list[_Interval]] = {}
    for event in events:
        if event.get("ph") != "X":
            continue
        name, place = str(event["name"]), event.get("tid")
        start = base + round(float(event["ts"]) * 1e3)
        end = start + round(float(event.get("dur", 0)) * 1e3)
        lane = _lane(str(event.get("cat")), name, how, on_device)
        if lane is Lane.COMPUTE:
            operations.setdefault(place, []).append((start, end, name))
        elif lane is not None:
            spans.append(Span(name, lane, start, end))
            if lane is Lane.COMMUNICATION:
                messages.setdefault(place, []).append((start, end, name))
    for place, intervals in operations.items():
        spans += _joined(_outside(intervals, messages.get(place, [])), how.gap_ns)
    spans.sort(key=lambda span: (span.start_ns, -span.end_ns))
    return RankTimeline(
        rank=rank,
        host=host,
        spans=tuple(spans),
        memory=tuple(_memory(events, base, on_device)),
        clock_error_ns=how.clock_error_ns,
    )


def _lane(category: str, name: str, how: Reading, on_device: bool) -> Lane | None:
    if category == "user_annotation":
        if name.startswith(how.messages):
            return Lane.COMMUNICATION
        return Lane.PHASE if name.startswith(how.phases) else Lane.RANGE
    if category in _DEVICE_WORK:
        is_message = "nccl" in name.lower() or "rccl" in name.lower()
        return Lane.COMMUNICATION if is_message else Lane.COMPUTE
    if category == "cpu_op" and not on_device and not name.startswith(("c10d::", "record_param")):
        return Lane.COMPUTE
    return None


def _memory(events: Iterable[Mapping[str, Any]], base: int, on_device: bool) -> list[tuple[int, int]]:
    points = []
    for event in events:
        values = event.get("args", {})
        if event.get("name") == "[memory]" and (int(values.get("Device Type", 0)) != 0) == on_device:
            points.append((base + round(float(event["ts"]) * 1e3), int(values.get("Total Allocated", 0))))
    return sorted(points)


def _outside(intervals: Iterable[_Interval], around: Iterable[_Interval]) -> Iterator[_Interval]:
    """The intervals that do not begin inside of one of `around`."""
    until, waiting = 0, sorted(around, reverse=True)
    for interval in sorted(intervals):
        while waiting and waiting[-1][0] <= interval[0]:
            until = max(until, waiting.pop()[1])
        if interval[0] >= until:
            yield interval


def _joined(intervals: Iterable[_Interval], gap_ns: int) -> Iterator[Span]:
    """Operations of one thread or stream; those inside of others, or close to each other, as one span with the name of
    the longest.
    """
    start = end = longest = 0
    name = ""
    for first, last, called in sorted(intervals):
        if not name or first > end + gap_ns:
            if name:
                yield Span(name, Lane.COMPUTE, start, end)
            start, end, name, longest = first, last, called, last - first
            continue
        end = max(end, last)
        if last - first > longest:
            name, longest = called, last - first
    if name:
        yield Span(name, Lane.COMPUTE, start, end)
