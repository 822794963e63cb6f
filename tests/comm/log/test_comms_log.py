"""Records of collectives: what is counted, what is not, and what a summary says."""

from __future__ import annotations

import contextlib
import time

import pytest
import torch
import torch.distributed as dist

from ds_comm.exchange.wire import bus_bytes
from ds_comm.log import CommsLog, LogOptions, summarise, watch_torch
from ds_comm.log.totals import RECENT
from ds_comm.same_host.collectives import connect_group
from harness import ranks


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def call(
    log: CommsLog, clock: Clock, seconds: float, operation: str = "all_reduce", size: int = 10**6
) -> None:
    end = log.begin(operation, size, 4)
    clock.now += seconds
    if end is not None:
        end()


def test_bandwidths_are_those_of_nccl_tests() -> None:
    clock = Clock()
    log = CommsLog(clock=clock)
    call(log, clock, 0.001)
    call(log, clock, 0.003)
    call(log, clock, 0.001, "all_gather")
    (reduced, gathered) = summarise(log).lines
    assert (reduced.operation, reduced.count, reduced.total_s) == ("all_reduce", 2, pytest.approx(0.004))
    assert reduced.algorithmic_bytes_per_s == pytest.approx(10**6 / 0.002)
    assert reduced.bus_bytes_per_s == pytest.approx(1.5 * 10**6 / 0.002)
    assert gathered.bus_bytes_per_s == pytest.approx(0.75 * 10**6 / 0.001)
    assert bus_bytes("broadcast", 100, 4) == 100


def test_only_the_wanted_operations_are_recorded() -> None:
    clock = Clock()
    log = CommsLog(LogOptions(prof_all=False, prof_ops=("broadcast",)), clock=clock)
    call(log, clock, 0.001)
    call(log, clock, 0.001, "broadcast")
    assert [key.operation for key in log.totals()] == ["broadcast"]
    log.reset()
    assert not log.totals()


def test_calls_within_a_recorded_call_are_parts_of_it() -> None:
    clock = Clock()
    log = CommsLog(clock=clock)
    with log.inside():
        call(log, clock, 0.001)
    call(log, clock, 0.001)
    assert [total.count for total in log.totals().values()] == [1]


def test_verbose_and_debug_name_time_and_caller() -> None:
    clock, lines = Clock(), list[str]()
    log = CommsLog(LogOptions(verbose=True, debug=True), write=lines.append, clock=clock)
    call(log, clock, 0.002)
    assert (
        "all_reduce | time: 2.000 ms | size: 1000000 bytes | ranks: 4 | algbw: 4.00 Gb/s | busbw: 6.00"
        in lines[0]
    )
    (key,) = log.totals()
    assert key.caller.startswith(f"{__name__}:") and key.caller.endswith(" call")


def test_a_long_job_keeps_a_bounded_number_of_durations() -> None:
    clock = Clock()
    log = CommsLog(clock=clock)
    for _ in range(RECENT + 5):
        call(log, clock, 1.0)
    (total,) = log.totals().values()
    assert (total.count, total.time_s, len(total.recent_s)) == (RECENT + 5, RECENT + 5.0, RECENT)


@ranks(2)
def test_torchs_calls_and_native_ones_are_seen_and_the_late_rank_is_named() -> None:
    before = dist.all_reduce
    log = CommsLog()
    calls = watch_torch(log)
    assert dist.all_reduce is not before
    x = torch.ones(1024)
    for _ in range(3):
        if dist.get_rank() == 1:
            time.sleep(0.05)
        dist.all_reduce(x)
    assert x[0] == 8
    work = dist.all_to_all_single(torch.empty(1024), x, async_op=True)
    work.wait()
    near = connect_group(log=log)
    if near is not None:
        near.broadcast(x)
        near.close()
    calls.close()
    assert dist.all_reduce is before
    dist.all_reduce(x)
    summary = summarise(log)
    lines = {(line.operation, line.num_bytes): line for line in summary.lines}
    reduced = lines["all_reduce", 4096]
    assert reduced.count == reduced.timed == 3
    assert reduced.sent_bytes == 3 * 4096
    assert lines["all_to_all_single", 4096].timed == 1  # its end is seen although nobody told the log
    assert near is None or lines["broadcast", 4096].count == 1
    assert reduced.last_rank == 1
    assert reduced.waits_s[0] > 0.1
    text = summary.text(show_straggler=True)
    assert next(row for row in text.splitlines() if row.startswith("all_reduce")).split()[-1] == "1"
    told = summary.as_dict(show_straggler=True)
    assert told["summary"]["all_reduce"][4096]["count"] == 3
    assert told["straggler_analysis"]["all_reduce"][4096]["last_rank"] == 1


@ranks(1)
def test_two_logs_watch_independently() -> None:
    first, second = CommsLog(), CommsLog()
    outer, inner = watch_torch(first), watch_torch(second)
    dist.barrier()
    outer.close()  # in the other order than they began
    dist.barrier()
    inner.close()
    dist.barrier()
    counts = [sum(total.count for total in log.totals().values()) for log in (first, second)]
    assert counts == [1, 2]


@ranks(2)
def test_messages_are_recorded_alone_and_in_batches() -> None:
    log, other = CommsLog(), 1 - dist.get_rank()
    before = dist.isend
    with contextlib.closing(watch_torch(log)):
        sent, received = torch.full((3,), float(dist.get_rank())), torch.empty(3)
        works = [dist.isend(sent, other), dist.irecv(received, other)]
        for work in works:
            assert work is not None
            work.wait()
        assert received.tolist() == [float(other)] * 3
        # torch accepts only its own functions in a batch.
        batch = [dist.P2POp(dist.isend, 2 * sent, other), dist.P2POp(dist.irecv, received, other)]
        for work in dist.batch_isend_irecv(batch):
            work.wait()
        assert received.tolist() == [2.0 * other] * 3
    assert dist.isend is before
    totals = {(key.operation, key.num_bytes): total for key, total in log.totals().items()}
    assert {name: total.count for name, total in totals.items()} == {
        ("isend", 12): 1,
        ("irecv", 12): 1,
        ("batch_isend_irecv", 12): 1,
    }
    assert totals["isend", 12].sent_bytes == 12 and totals["irecv", 12].sent_bytes == 0
