"""Residuals: saved, loaded, and divided among another number of ranks."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from ds_comm.compress import Blocks, ErrorFeedback, ResidualError, SignCompressor, merge_feedback_states

BLOCKS = Blocks.of([1000, 5000, 30], 256)[0]


def _feedback(rank: int, world_size: int, **options: Any) -> ErrorFeedback:
    feedback = ErrorFeedback(
        SignCompressor(block_numel=256), BLOCKS, rank=rank, world_size=world_size, **options
    )
    feedback.worker.copy_(torch.randn(feedback.numel))
    feedback.server.copy_(torch.randn(feedback.server.numel()))
    return feedback


def test_its_own_state_loads_exactly() -> None:
    first, second = _feedback(1, 3), _feedback(1, 3)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.worker, second.worker)
    assert torch.equal(first.server, second.server)


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (3, 1), (1, 3), (4, 4)])
def test_another_number_of_ranks_keeps_what_the_average_depends_on(before: int, after: int) -> None:
    old = [_feedback(rank, before) for rank in range(before)]
    state = merge_feedback_states([feedback.state_dict() for feedback in reversed(old)])
    new = [_feedback(rank, after) for rank in range(after)]
    for feedback in new:
        feedback.load_state_dict(state)
    torch.testing.assert_close(
        torch.stack([f.worker for f in new]).mean(0), torch.stack([f.worker for f in old]).mean(0)
    )
    assert torch.equal(torch.cat([f.server for f in new]), torch.cat([f.server for f in old]))


def test_the_dtype_of_residuals_is_a_setting() -> None:
    feedback = _feedback(0, 2, dtype=torch.bfloat16)
    assert feedback.num_bytes == 2 * (feedback.worker.numel() + feedback.server.numel())
    with pytest.raises(ValueError, match=r"must be torch.float32 or torch.bfloat16, but is torch.float16"):
        _feedback(0, 2, dtype=torch.float16)


def test_states_that_do_not_fit_are_refused() -> None:
    states = [_feedback(rank, 3).state_dict() for rank in range(3)]
    with pytest.raises(ResidualError, match=r"those of rank 1 of 3, but this is rank 0 of 2.*merge"):
        _feedback(0, 2).load_state_dict(states[1])
    with pytest.raises(ResidualError, match=r"ranks \[0, 2\] were given, \[1\] are missing"):
        merge_feedback_states([states[0], states[2]])
    with pytest.raises(ResidualError, match="once"):
        merge_feedback_states([states[0], states[0], states[1], states[2]])
    other = ErrorFeedback(SignCompressor(), Blocks.uniform(64, 64), rank=0, world_size=3)
    with pytest.raises(ResidualError, match=r"have 6144 elements, but the parameters need 64") as caught:
        other.load_state_dict(states[0])
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(ResidualError):
        merge_feedback_states([])
