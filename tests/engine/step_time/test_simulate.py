"""The time of a step, against sums that can be done by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ds_engine.step_time import Inside, Link, Rates, Unit, Workload, simulate

RATES = Rates(
    forward_flops_per_s=1e9,
    backward_flops_per_s=1e9,
    memory_bytes_per_s=1e9,
    gather=Link(latency_s=0.0 + 1e-9, bytes_per_s=1e9),
    reduce=Link(latency_s=0.0 + 1e-9, bytes_per_s=1e9),
)
UNITS = tuple(Unit(name=f"u{i}", numel=100, forward_flops=1e9, backward_flops=2e9) for i in range(4))
PLAIN = Workload(units=UNITS, ranks=1, micro_batches=1)


def test_one_rank_computes_and_updates() -> None:
    time = simulate(replace(PLAIN, micro_batches=3, optimizer_bytes=5e9), RATES)
    assert time.total_s == pytest.approx(3 * 12 + 5)
    assert time.compute_s == pytest.approx(36) and time.update_s == pytest.approx(5)
    assert time.messages_s == 0 and time.exposed_s == pytest.approx(0)


def test_every_pass_takes_its_fixed_part() -> None:
    rates = replace(RATES, forward_pass_s=0.5, backward_pass_s=1.5)
    time = simulate(replace(PLAIN, micro_batches=3), rates)
    assert time.total_s == time.compute_s == pytest.approx(3 * (12 + 2))


def test_reductions_hide_behind_the_backward_except_for_the_last_bucket() -> None:
    work = replace(PLAIN, ranks=2, micro_batches=2, reduce_bytes=4e9, buckets=4)
    time = simulate(work, RATES)
    # Only the last backward reduces: four buckets of 1 s, each while the next unit computes for 2 s.
    assert time.messages_s == pytest.approx(4) and time.exposed_s == pytest.approx(1)
    every = simulate(replace(work, reduce_every_micro_batch=True), RATES)
    assert every.messages_s == pytest.approx(8) and every.exposed_s == pytest.approx(1)
    whole = simulate(replace(work, buckets=1), RATES)
    assert whole.exposed_s == pytest.approx(4)


def test_gathers_run_one_unit_ahead() -> None:
    work = replace(PLAIN, ranks=2, gather_forward_bytes=2e9, gather_backward_bytes=2e9)
    # Each unit takes 0.5 s to gather and at least 1 s to compute: only the first gather of each pass is seen.
    assert simulate(work, RATES).exposed_s == pytest.approx(1.0)
    slow = replace(work, gather_forward_bytes=8e9, gather_backward_bytes=0.0)
    # 2 s a gather, 1 s a unit: the forward is as long as its messages and its last unit.
    assert simulate(slow, RATES).total_s == pytest.approx(4 * 2 + 1 + 8)


def test_what_occupies_the_rank_is_not_hidden() -> None:
    work = replace(PLAIN, ranks=2, reduce_bytes=4e9, buckets=4)
    assert simulate(work, replace(RATES, occupies=1.0)).exposed_s == pytest.approx(4)
    assert 1 < simulate(work, replace(RATES, occupies=0.5)).exposed_s < 4


def test_published_parameters_are_waited_for() -> None:
    assert simulate(replace(PLAIN, ranks=2, publish_bytes=3e9), RATES).exposed_s == pytest.approx(3)


def test_the_slowest_of_update_copies_and_disk_counts() -> None:
    work = replace(
        PLAIN, optimizer_bytes=1e9, host_copy_bytes=4e10, disk_read_bytes=9e9, disk_write_bytes=2e9
    )
    assert simulate(work, RATES).update_s == pytest.approx(3 + 1)
    assert simulate(replace(work, host_copy_bytes=2e11), RATES).update_s == pytest.approx(10)


def test_messages_to_other_machines_take_the_slower_link() -> None:
    rates = replace(RATES, between_hosts=Link(latency_s=1e-3, bytes_per_s=1e8), ranks_per_host=4)
    work = replace(PLAIN, ranks=4, publish_bytes=1e9)
    assert simulate(work, rates).exposed_s == pytest.approx(1, rel=1e-3)
    assert simulate(replace(work, ranks=8), rates).exposed_s == pytest.approx(10 + 3e-3, rel=1e-6)


def test_messages_within_layers_are_waited_for() -> None:
    inside = Inside(
        axis="tensor",
        ranks=2,
        forward_bytes=1e9,
        forward_messages=4,
        backward_bytes=2e9,
        backward_messages=8,
    )
    work = replace(PLAIN, micro_batches=2, inside=(inside,))
    time = simulate(work, replace(RATES, gather=Link(latency_s=0.25, bytes_per_s=1e9)))
    # 1 s and 4 latencies in each forward, 2 s and 8 in each backward.
    assert time.exposed_s == time.messages_s == pytest.approx(2 * (1 + 1 + 2 + 2))
    assert time.compute_s == pytest.approx(24) and time.total_s == pytest.approx(36)
    (axis,) = time.axes
    assert (axis.axis, axis.sent_bytes, axis.seconds) == ("tensor", 6e9, pytest.approx(12))


def test_the_data_axis_leaves_a_machine_that_other_axes_fill() -> None:
    far = Link(latency_s=1e-9, bytes_per_s=1e8)
    rates = replace(RATES, between_hosts=far, ranks_per_host=4)
    work = replace(PLAIN, ranks=2, reduce_bytes=1e9)
    assert simulate(work, rates).messages_s == pytest.approx(1)
    assert simulate(replace(work, stride=4), rates).messages_s == pytest.approx(10)
