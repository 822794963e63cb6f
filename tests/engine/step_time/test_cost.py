"""What a training costs, against sums that can be done by hand."""

from __future__ import annotations

import pytest

from ds_engine.step_time import Link, Rates, cost_of

LINK = Link(latency_s=1e-6, bytes_per_s=1e9)
RATES = Rates(
    forward_flops_per_s=1e9,
    backward_flops_per_s=1e9,
    memory_bytes_per_s=1e9,
    gather=LINK,
    reduce=LINK,
    price_per_rank_hour=3.0,
)


def test_cost_of_steps_tokens_and_the_run() -> None:
    cost = cost_of(36.0, RATES, ranks=8, samples=16, tokens=1000, steps=200)
    assert cost is not None
    assert cost.step == pytest.approx(8 * 3.0 / 100)
    assert cost.per_million_tokens == pytest.approx(0.24 / 16000 * 1e6)
    assert cost.per_million_samples == pytest.approx(0.24 / 16 * 1e6)
    assert (cost.run, cost.run_s) == (pytest.approx(48.0), pytest.approx(7200.0))
    assert cost.lines()[1] == "the whole run: 2.0 hours, 48.00"
    without = cost_of(36.0, RATES, ranks=8, samples=16, tokens=None, steps=None)
    assert without is not None and without.run is None and "for a million samples" in without.lines()[0]


def test_without_a_price_there_is_no_cost() -> None:
    free = Rates(
        forward_flops_per_s=1e9, backward_flops_per_s=1e9, memory_bytes_per_s=1e9, gather=LINK, reduce=LINK
    )
    assert cost_of(1.0, free, ranks=1, samples=1, tokens=None, steps=None) is None
