"""RngTracker: streams beside the default one."""

from __future__ import annotations

import pytest
import torch

from ds_layers import RngTracker, model_parallel_seed


def test_streams_differ_between_model_parallel_ranks_and_the_default_one_does_not() -> None:
    inside, outside = [], []
    for rank in range(2):
        tracker = RngTracker("cpu")
        model_parallel_seed(tracker, 5, rank)
        first = torch.rand(4)
        with tracker.fork():
            inside.append(torch.rand(4))
        outside.append(torch.cat([first, torch.rand(4)]))
    assert torch.equal(outside[0], outside[1])
    assert not torch.equal(inside[0], inside[1])


def test_a_stream_goes_on_where_it_stopped_also_after_an_exception() -> None:
    tracker = RngTracker("cpu")
    tracker.add("a", 1)
    torch.manual_seed(1)
    expected = [torch.rand(2), torch.rand(2), torch.rand(2)]
    with tracker.fork("a"):
        assert torch.equal(torch.rand(2), expected[0])
    saved = tracker.states()

    def fail() -> None:
        with tracker.fork("a"):
            assert torch.equal(torch.rand(2), expected[1])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with tracker.fork("a"):
        assert torch.equal(torch.rand(2), expected[2])
    tracker.set_states(saved)
    with tracker.fork("a"):
        assert torch.equal(torch.rand(2), expected[1])


def test_adding_a_stream_leaves_the_default_one_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    RngTracker("cpu").add("a", 9)
    assert torch.equal(torch.rand(3), expected)


def test_names_and_seeds_are_taken_once() -> None:
    tracker = RngTracker("cpu")
    tracker.add("a", 1)
    with pytest.raises(ValueError, match="'a' already"):
        tracker.add("a", 2)
    with pytest.raises(ValueError, match="is used by the stream 'a'"):
        tracker.add("b", 1)
    with pytest.raises(ValueError, match="no stream 'c'"), tracker.fork("c"):
        pass
    tracker.reset()
    tracker.add("b", 1)
