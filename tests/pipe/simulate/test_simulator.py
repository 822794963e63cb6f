"""The simulator: bubbles equal the formulas, deadlocks are printed, memory and bytes are counted."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from ds_pipe import Costs, DeadlockError, Schedule, ScheduleError, StageCosts, lower, make, simulate
from ds_pipe.actions import Op
from ds_pipe.simulate import bubble_of_one_step


@pytest.mark.parametrize(
    "name, percent",
    [
        ("gpipe", 27.3),
        ("1f1b", 27.3),
        ("interleaved", 15.8),
        ("zb-h1", 11.1),
        ("zb-h2", 11.1),
        ("zb-v", 5.9),
    ],
)
def test_bubbles_of_4_ranks_and_8_micro_batches(name, percent):
    bubble = simulate(lower(make(name, 4, 8))).bubble
    assert round(100 * bubble, 1) == percent
    assert bubble == pytest.approx(bubble_of_one_step(name, 4, 8))


@pytest.mark.parametrize("p, m", [(2, 4), (2, 16), (3, 6), (4, 16), (4, 64), (5, 10), (6, 12), (8, 16)])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v"])
def test_bubbles_equal_the_formulas(name, p, m):
    assert simulate(make(name, p, m)).bubble == pytest.approx(bubble_of_one_step(name, p, m))


def test_zero_bubble_schedules_have_none_between_consecutive_steps():
    assert simulate(make("zb-h2", 4, 8), steps=10).bubble == pytest.approx(0)
    v = simulate(make("zb-v", 4, 8), steps=10)
    assert v.bubble == pytest.approx(0)
    one = simulate(
        make("1f1b", 4, 8),
        Costs.uniform(4, StageCosts(forward_s=2, backward_input_s=2, backward_weight_s=2)),
        steps=10,
    )
    assert one.step_s / v.step_s == pytest.approx(11 / 8)


def test_a_deadlock_is_refused_with_its_cycle():
    # Rank 0 wants the gradient of micro-batch 0 before it sends micro-batch 1, for which rank 1 waits first.
    broken = Schedule.parse("0F0,0B0,0F1,0B1\n1F0,1F1,1B1,1B0")
    with pytest.raises(DeadlockError) as error:
        simulate(broken)
    assert "rank 0 waits at 0B0 for 1B0, which rank 1 runs after 1F1" in str(error.value)
    assert "rank 1 waits at 1F1 for 0F1, which rank 0 runs after 0B0" in str(error.value)


def test_a_deadlock_of_three_ranks_names_exactly_those():
    good = make("1f1b", 4, 8)
    rows = list(good.actions)
    row = list(rows[1])
    row.insert(0, row.pop(row.index(next(a for a in row if a.op is Op.FORWARD and a.microbatch == 7))))
    rows[1] = tuple(row)
    with pytest.raises(DeadlockError) as error:
        simulate(replace(good, actions=tuple(rows)))
    assert sorted(map(int, re.findall(r"rank (\d) waits", str(error.value)))) == [0, 1]


@pytest.mark.parametrize(
    "drop, message",
    [
        (Op.SEND_FORWARD, "0SEND_F0, which rank 0 never runs"),
        (Op.RECV_FORWARD, "1RECV_F0, which rank 1 never runs"),
    ],
)
def test_a_missing_message_is_named(drop, message):
    lowered = lower(make("1f1b", 2, 2))
    rows = tuple(tuple(a for a in row if not (a.op is drop and a.microbatch == 0)) for row in lowered.actions)
    error = DeadlockError if drop is Op.RECV_FORWARD else ScheduleError
    with pytest.raises(error, match=f"{message}|expects 1RECV_F0"):
        simulate(replace(lowered, actions=rows))


def test_messages_in_another_order_than_their_receives_are_refused():
    text = "0F0,0F1,0SEND_F1,0SEND_F0\n1RECV_F0,1RECV_F1,1F0,1F1"
    with pytest.raises(
        ScheduleError, match="rank 1 expects 1RECV_F0 from rank 0, whose next message is for 1RECV_F1"
    ):
        simulate(Schedule.parse(text))


def test_costs_of_messages_lengthen_a_step_by_what_a_pencil_says():
    costs = Costs(stages=(StageCosts(output_bytes=10),) * 2, latency_s=0.5, bytes_per_s=20)
    # F0, message of 0.5 + 0.5 s, F0 and its backward of 2 s on the other rank, message, backward of 2 s
    assert simulate(make("1f1b", 2, 1), costs).total_s == pytest.approx(1 + 1 + 1 + 2 + 1 + 2)
    assert simulate(lower(make("1f1b", 2, 1)), costs).total_s == pytest.approx(8)
    assert simulate(make("1f1b", 2, 3), costs).sent_bytes == (30, 30)


def test_a_link_transfers_one_message_at_a_time():
    costs = Costs(stages=(StageCosts(forward_s=0, output_bytes=1), StageCosts(forward_s=0)), bytes_per_s=1)
    assert simulate(make("inference", 2, 5), costs).total_s == pytest.approx(5)


def test_receiving_late_lengthens_a_step():
    costs = Costs(stages=(StageCosts(output_bytes=1),) * 4, bytes_per_s=2)
    late, early = (simulate(lower(make("1f1b", 4, 8), receive_ahead=n), costs).total_s for n in (0, 2))
    assert late > early


def test_bytes_between_both_parts_of_backward():
    part = StageCosts(activation_bytes=10, weight_activation_bytes=4, resident_bytes=100)
    result = simulate(make("zb-h1", 1, 1), Costs.uniform(1, part))
    assert result.peak_activation_bytes == (10,) and result.peak_bytes == 110
    split = Schedule.parse("0F0,0I0,0F1,0I1,0W0,0W1")
    assert simulate(split, Costs.uniform(1, part)).peak_activation_bytes == (14,)


def test_gathering_ahead_hides_it_and_a_reduction_ends_the_step():
    part = StageCosts(unshard_s=1.0, reduce_s=0.75)
    hidden = simulate(lower(make("interleaved", 2, 2), sharded=True, max_unsharded=2), Costs.uniform(4, part))
    shown = simulate(lower(make("interleaved", 2, 2), sharded=True, max_unsharded=1), Costs.uniform(4, part))
    assert hidden.total_s < shown.total_s
    assert hidden.spans[-1].action.op is Op.REDUCE_GRAD


def test_costs_are_read_from_json():
    costs = Costs.parse('{"stages": [{"forward_s": 2}, {"activation_bytes": 3}], "latency_s": 1}')
    assert costs == Costs(stages=(StageCosts(forward_s=2), StageCosts(activation_bytes=3)), latency_s=1)
    for text, message in [
        ("{", "not JSON"),
        ("[]", 'list "stages"'),
        ('{"stages": [{"forwards": 1}]}', r"stages\[0\]: no field 'forwards'"),
        ('{"stages": [{}], "latency_s": -1}', r"costs.latency_s has to be a number"),
    ]:
        with pytest.raises(ValueError, match=message):
            Costs.parse(text)
