"""Actions: their text form is torch's, and round-trips."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_pipe import Action, Op, ScheduleError
from ds_pipe.actions import backward, forward, overlap

singles = st.builds(
    lambda stage, op, m: Action(stage, op, None if op.of_whole_stage else m),
    st.integers(0, 300),
    st.sampled_from([op for op in Op if op is not Op.OVERLAP]),
    st.integers(0, 300),
)


@settings(deadline=None)
@given(singles | st.builds(overlap, singles, singles))
def test_text_round_trips(action):
    assert Action.parse(str(action)) == action


@settings(deadline=None)
@given(singles)
def test_text_is_that_of_torch(action):
    from torch.distributed.pipelining.schedules import _Action

    theirs = _Action.from_str(str(action))
    assert str(theirs) == str(action)
    assert Action.parse(repr(theirs)) == action


def test_an_overlap_is_read_as_torch_writes_it():
    from torch.distributed.pipelining.schedules import _Action

    text = "(0F3;7B1)OVERLAP_F_B"
    assert Action.parse(text) == overlap(forward(0, 3), backward(7, 1))
    assert repr(_Action.from_str(text)) == text


@pytest.mark.parametrize("text", ["", "F0", "2X0", "2F", "2UNSHARD0", "2F0 3F0", "(0F1)OVERLAP_F_B"])
def test_what_is_no_action_is_refused(text):
    with pytest.raises(ScheduleError):
        Action.parse(text)
