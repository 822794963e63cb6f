"""`choose`: the fastest schedule that fits, never slower than 1F1B."""

from __future__ import annotations

import pytest

from ds_pipe import Costs, ScheduleError, StageCosts, choose, make, simulate

PART = StageCosts(
    forward_s=1.0, backward_input_s=1.1, backward_weight_s=0.9, activation_bytes=10, output_bytes=1
)


def by_name(choice):
    return {c.name: c for c in choice.candidates}


def test_without_a_limit_a_schedule_without_bubbles_wins():
    choice = choose(Costs.uniform(8, StageCosts()), 4, 8)
    assert choice.best.name in ("zb-v", "zb-h2")
    assert choice.candidates[0].simulation.bubble == pytest.approx(0)


@pytest.mark.parametrize(
    "p, latency",
    [
        (2, 0.2),
        (4, 1.0),
        *(pytest.param(p, t, marks=pytest.mark.full) for p in (2, 4, 8) for t in (0.0, 0.5, 3.0)),
    ],
)
def test_at_64_micro_batches_the_choice_is_not_slower_than_1f1b(p, latency):
    costs = Costs(stages=(PART,) * 2 * p, latency_s=latency, bytes_per_s=5.0, action_s=0.05)
    choice = choose(costs, p, 64)
    plain = simulate(make("1f1b", p, 64), costs.merged(p), steps=4)
    assert choice.candidates[0].simulation.step_s <= plain.step_s


def test_a_cost_of_each_action_makes_fewer_stages_better():
    fast = by_name(choose(Costs(stages=(PART,) * 8), 4, 16))
    slow = by_name(choose(Costs(stages=(PART,) * 8, action_s=3.0), 4, 16))
    assert fast["interleaved"].simulation.step_s < fast["1f1b"].simulation.step_s
    assert slow["interleaved"].simulation.step_s > slow["1f1b"].simulation.step_s


def test_a_limit_of_memory_excludes_what_does_not_fit():
    costs = Costs(stages=(PART,) * 8)
    free = choose(costs, 4, 8)
    limited = choose(costs, 4, 8, memory_limit_bytes=50)
    assert all(c.simulation.peak_bytes <= 50 for c in limited.candidates if c.fits)
    assert limited.best.name.startswith("zb-v-")
    assert limited.candidates[0].simulation.step_s > free.candidates[0].simulation.step_s
    assert {c.name for c in limited.candidates if not c.fits} >= {"gpipe", "1f1b", "zb-h2"}


def test_a_limit_that_nothing_fits_is_an_error_with_numbers():
    choice = choose(Costs(stages=(PART,) * 8), 4, 8, memory_limit_bytes=5)
    with pytest.raises(ScheduleError, match="needs least memory, 20 bytes"):
        _ = choice.best


def test_what_cannot_be_is_left_out_with_the_reason():
    choice = choose(Costs(stages=(PART,) * 4), 4, 4)
    assert {reason.split(":")[0] for reason in choice.left_out} == {"interleaved", "zb-v", "dualpipev"}
    with pytest.raises(ValueError, match="6 stages cannot be divided evenly among 4 ranks"):
        choose(Costs(stages=(PART,) * 6), 4, 4)
