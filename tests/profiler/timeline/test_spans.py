"""From a trace to lanes."""

from __future__ import annotations

import json

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ds_profiler.timeline import Lane, RankTimeline, Reading, Span, read


def event(name, start, duration, category="cpu_op", thread=1):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": thread}


def test_events_are_sorted_into_lanes_and_moved_to_the_clock_of_rank_0():
    trace = {
        "baseTimeNanoseconds": 1000,
        "traceEvents": [
            event("ds.engine.forward", 0, 100, "user_annotation"),
            event("mine", 5, 10, "user_annotation"),
            event("aten::linear", 10, 20),
            event("aten::mm", 12, 5),  # inside of the one before
            event("aten::add", 35, 5),  # 5 us later: drawn as one
            event("aten::mul", 90, 5),
            event("gloo:all_reduce", 50, 30, "user_annotation", thread=2),
            event("aten::copy_", 55, 5, thread=2),  # part of the message
            event("c10d::allreduce_", 49, 2),
            {"ph": "i", "name": "[memory]", "ts": 20, "args": {"Total Allocated": 64, "Device Type": 0}},
            {"ph": "M", "name": "process_name"},
        ],
    }
    timeline = read(trace, 3, "host", Reading(clock_offset_ns=500, clock_error_ns=7))
    assert [(s.name, s.lane, s.start_ns - 1500, s.end_ns - 1500) for s in timeline.spans] == [
        ("ds.engine.forward", Lane.PHASE, 0, 100_000),
        ("mine", Lane.RANGE, 5_000, 15_000),
        ("aten::linear", Lane.COMPUTE, 10_000, 40_000),
        ("gloo:all_reduce", Lane.COMMUNICATION, 50_000, 80_000),
        ("aten::mul", Lane.COMPUTE, 90_000, 95_000),
    ]
    assert timeline.memory == ((21_500, 64),)
    assert (timeline.rank, timeline.clock_error_ns) == (3, 7)
    assert RankTimeline.from_dict(json.loads(json.dumps(timeline.as_dict()))) == timeline


def test_of_an_accelerator_the_kernels_count_and_not_what_starts_them():
    trace = {
        "traceEvents": [
            event("aten::mm", 0, 50),
            event("gemm", 10, 20, "kernel", thread=7),
            event("ncclDevKernel_AllReduce", 12, 30, "kernel", thread=8),
            event("Memcpy HtoD", 60, 1, "gpu_memcpy", thread=7),
            {"ph": "i", "name": "[memory]", "ts": 1, "args": {"Total Allocated": 5, "Device Type": 0}},
            {"ph": "i", "name": "[memory]", "ts": 2, "args": {"Total Allocated": 9, "Device Type": 1}},
        ]
    }
    timeline = read(trace, 0, "host", Reading(gap_ns=0))
    assert [(s.name, s.lane) for s in timeline.spans] == [
        ("gemm", Lane.COMPUTE),
        ("ncclDevKernel_AllReduce", Lane.COMMUNICATION),
        ("Memcpy HtoD", Lane.COMPUTE),
    ]
    assert timeline.memory == ((2000, 9),)


def test_a_real_trace_of_this_torch(tmp_path):
    """The format of traces is torch's: what this module relies on is there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with record_function("ds.engine.step"):
            block = torch.randn(300, 300) @ torch.randn(300, 300)
    file = tmp_path / "trace.json"
    profiler.export_chrome_trace(str(file))
    timeline = read(json.loads(file.read_bytes()), 0, "host")
    (phase,) = timeline.of(Lane.PHASE)
    assert phase.name == "ds.engine.step"
    inside = [
        s for s in timeline.of(Lane.COMPUTE) if phase.start_ns <= s.start_ns <= s.end_ns <= phase.end_ns
    ]
    assert inside
    assert max(held for _, held in timeline.memory) - min(held for _, held in timeline.memory) >= block.nbytes
    import time

    assert abs(phase.start_ns - time.time_ns()) < 600e9  # nanoseconds since the epoch
    assert Span("a", Lane.PHASE, 2, 5).duration_ns == 3
