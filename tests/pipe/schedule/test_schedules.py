"""Every schedule is complete, free of deadlock before and after lowering, and keeps within its memory."""

from __future__ import annotations

import itertools

import pytest

from ds_pipe import NAMES, Op, Schedule, ScheduleError, lower, make, simulate
from ds_pipe.schedule import TRAINING, check, merged_backwards

SIZES = [
    pytest.param(p, m, marks=[] if p in (1, 2, 4) and m in (1, 4, 8, 9) else pytest.mark.full)
    for p, m in itertools.product(range(1, 9), range(1, 18))
]
KINDS = [(name, None) for name in NAMES] + [("interleaved", 1), ("interleaved", 3), ("inference", 2)]


def made(name: str, chunks: int | None, p: int, m: int) -> Schedule | None:
    if name == "dualpipev" and m < 2 * p:
        with pytest.raises(ScheduleError, match=f"at least {2 * p} micro-batches"):
            make(name, p, m)
        return None
    return make(name, p, m, chunks=chunks)


@pytest.mark.parametrize("p, m", SIZES)
@pytest.mark.parametrize("name, chunks", KINDS)
def test_runs_to_its_end_before_and_after_lowering(name, chunks, p, m):
    schedule = made(name, chunks, p, m)
    if schedule is None:
        return
    check(schedule)
    plain = simulate(schedule)
    for ahead in (0, 1, 3):
        lowered = lower(schedule, receive_ahead=ahead, sharded=True, max_unsharded=1 + ahead)
        assert simulate(lowered, steps=2).schedule.num_microbatches == m
        if ahead:
            assert simulate(lowered).total_s == plain.total_s
        assert Schedule.parse(str(lowered)) == lowered


def counts(schedule: Schedule, op: Op) -> int:
    return sum(a.op is op for row in schedule.actions for a in row)


@pytest.mark.parametrize("name", TRAINING)
def test_lowering_adds_each_message_and_each_reduction_once(name):
    schedule = make(name, 4, 8)
    lowered = lower(schedule, sharded=True)
    crossings = sum(a != b for a, b in itertools.pairwise(schedule.rank_of_stage))
    for op in (Op.SEND_FORWARD, Op.RECV_FORWARD, Op.SEND_BACKWARD, Op.RECV_BACKWARD):
        assert counts(lowered, op) == 8 * crossings
    assert counts(lowered, Op.REDUCE_GRAD) == schedule.num_stages
    assert counts(lowered, Op.UNSHARD) == counts(lowered, Op.RESHARD) >= schedule.num_stages


@pytest.mark.parametrize("max_unsharded", [1, 2])
def test_no_more_stages_are_gathered_than_allowed(max_unsharded):
    lowered = lower(make("interleaved", 2, 4, chunks=3), sharded=True, max_unsharded=max_unsharded)
    for row in lowered.actions:
        gathered: set[int] = set()
        for action in row:
            if action.op is Op.UNSHARD:
                gathered.add(action.stage)
            elif action.op is Op.RESHARD:
                gathered.remove(action.stage)
            elif action.op.computes:
                assert action.stage in gathered
            assert len(gathered) <= max_unsharded
        assert not gathered


def test_a_receive_starts_before_the_computation_that_precedes_its_use():
    row = lower(make("1f1b", 2, 4)).actions[1]
    assert " ".join(map(str, row)) == (
        "1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1RECV_F2 1B1 1SEND_B1 1F2 1RECV_F3 1B2 1SEND_B2 1F3 1B3 1SEND_B3 "
        "1REDUCE_GRAD"
    ).replace("1RECV_F0 1F0 1RECV_F1 1B0", "1RECV_F0 1F0 1RECV_F1 1B0")


def test_both_parts_of_a_backward_are_joined_only_where_nobody_waits_for_the_first():
    merged = merged_backwards(make("zb-h1", 4, 8))
    assert counts(merged, Op.BACKWARD) > 0
    for row in merged.actions[1:]:
        assert not any(a.op is Op.BACKWARD for a in row)


# (name, largest number of activations on any rank, in stages) for 4 ranks and 8 micro-batches
@pytest.mark.parametrize(
    "name, most", [("gpipe", 8), ("1f1b", 4), ("zb-h1", 4), ("zb-h2", 7), ("zb-v", 8), ("dualpipev", 9)]
)
def test_activations_are_bounded(name, most):
    assert max(simulate(make(name, 4, 8)).peak_activations) == most
    if name != "gpipe":
        assert max(simulate(make(name, 4, 24)).peak_activations) == most


@pytest.mark.parametrize("kept", [2, 3, 5, 6, 8])
def test_zb_v_keeps_no_more_activations_than_it_may(kept):
    result = simulate(make("zb-v", 4, 12, max_activations=kept))
    assert max(result.peak_activations) == kept


def test_more_memory_makes_zb_v_faster():
    times = [simulate(make("zb-v", 4, 12, max_activations=k)).total_s for k in (2, 4, 6, 8)]
    assert times == sorted(times, reverse=True) and times[0] > times[-1]


def test_zero_bubble_schedules_are_fitted_to_unequal_times():
    from ds_pipe import Costs, StageCosts

    times = [(1.0, 2.0, 1.0), (3.0, 3.0, 1.0), (1.0, 1.0, 1.0), (2.0, 2.0, 3.0)]
    costs = Costs(
        stages=tuple(StageCosts(forward_s=f, backward_input_s=i, backward_weight_s=w) for f, i, w in times)
    )
    fitted, plain = (simulate(make("zb-h1", 4, 12, times=t), costs).step_s for t in (times, None))
    assert fitted < plain


def test_torch_runs_our_schedules_and_we_read_theirs(tmp_path):
    from torch.distributed.pipelining import schedules as torch_schedules

    ours = make("interleaved", 4, 8)
    orders = {
        rank: [torch_schedules._Action.from_str(str(a)) for a in row] for rank, row in enumerate(ours.actions)
    }
    lowered = torch_schedules._add_send_recv(
        orders, stage_to_rank=lambda s: ours.rank_of_stage[s], num_stages=8
    )
    text = "\n".join(",".join(map(repr, lowered[rank])) for rank in range(4))
    read = Schedule.parse(text)
    assert read.rank_of_stage == ours.rank_of_stage
    assert simulate(read).bubble == pytest.approx(simulate(ours).bubble)


@pytest.mark.parametrize(
    "text, message",
    [
        ("0F0,0B0\n1F0", "rank 1 has to run either 1B0"),
        ("0B0,0F0", "0B0 before 0F0"),
        ("0F0,0F0,0B0", "0F0 twice"),
        ("0F0,0B0\n2F0,2B0", "no rank computes stage 1"),
        ("0F0,0I0", "either 0B0, or both 0I0 and 0W0"),
        ("0F0,0F1,0B0,0B1\n1F0,1B0,0SEND_F1", "stage 0 is not on this rank"),
        ("0SEND_F0,0F0,0B0", "0SEND_F0 before 0F0"),
        ("0F0,0B0,0x", "no action"),
    ],
)
def test_an_incomplete_schedule_is_refused(text, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule.parse(text)


def test_an_unknown_name_is_refused_with_a_suggestion():
    with pytest.raises(ScheduleError, match="did you mean 'zb-v'"):
        make("zbv", 4, 8)
    with pytest.raises(ScheduleError, match="only interleaved and inference"):
        make("1f1b", 4, 8, chunks=2)
