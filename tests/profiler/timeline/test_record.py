"""Recording on several ranks, and their clocks."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from ds_profiler.timeline import Lane, load, record, summaries, waits
from ds_profiler.timeline.clock import ClockOffset, estimate, offset_to_first_rank
from harness import ranks


def test_the_fastest_round_trip_counts():
    # This clock is 1000 behind; the first answer was delayed on its way back.
    assert estimate([0, 100], [1010, 1105], [60, 110]) == ClockOffset(1000, 5)


@ranks(3)
def test_clocks_and_stragglers(tmp_path):
    rank = dist.get_rank()
    ahead = 5_000_000_000 * rank
    offset = offset_to_first_rank(now=lambda: time.time_ns() + ahead)
    assert abs(offset.offset_ns + ahead) <= offset.error_ns
    assert (offset.error_ns == 0) == (rank == 0)

    with record(tmp_path):
        dist.barrier()
        for step in range(3):
            with torch.profiler.record_function("ds.engine.forward"):
                if rank == 1 and step == 1:
                    time.sleep(0.5)
                torch.randn(64, 64).mm(torch.randn(64, 64))
            dist.all_reduce(torch.ones(1000))
    dist.barrier()
    timelines = load(tmp_path)
    assert [t.rank for t in timelines] == [0, 1, 2]
    assert all(len(t.of(Lane.PHASE)) == 3 for t in timelines)
    reduced = [[s for s in t.of(Lane.COMMUNICATION) if s.name == "gloo:all_reduce"] for t in timelines]
    assert [len(spans) for spans in reduced] == [3, 3, 3]
    (late,) = [w for w in waits(timelines) if w.name == "gloo:all_reduce" and w.number == 1]
    assert late.last == 1
    assert late.late_ns > 250e6
    assert summaries(timelines)[1].blocked_ns >= late.late_ns


def test_a_single_process_and_a_block_that_fails(tmp_path):
    with record(tmp_path / "a"):
        torch.ones(10).sum()
    assert load(tmp_path / "a")[0].of(Lane.COMPUTE)
    with pytest.raises(RuntimeError, match="mine"), record(tmp_path / "b"):
        raise RuntimeError("mine")
    assert not (tmp_path / "b").exists()
