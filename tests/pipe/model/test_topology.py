"""Topologies: coordinates and ranks are inverse, groups are those of DeepSpeed."""

from __future__ import annotations

import pytest

from ds_pipe.model import PipeDataParallelTopology, PipeModelDataParallelTopology, ProcessTopology


def test_ranks_and_coordinates_are_inverse():
    topology = ProcessTopology(["x", "y", "z"], [2, 3, 4])
    assert topology.world_size() == 24 and topology.get_dim("y") == 3 and topology.get_dim("w") == 0
    for rank in range(24):
        assert topology.get_rank(**topology.get_coord(rank)._asdict()) == rank
    assert topology.get_coord(23) == (1, 2, 3)


def test_groups():
    topology = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=2)
    assert topology.get_axis_names() == ["pipe", "data", "model"]
    assert topology.get_axis_comm_lists("pipe") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert topology.get_axis_comm_lists("data") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert topology.get_axis_comm_lists("none") == []
    assert topology.filter_match(pipe=0, data=1) == [2, 3]
    assert topology.get_axis_list(axis="model", idx=1) == [1, 3, 5, 7]
    assert topology.get_rank_repr(3) == "model_01"
    assert PipeDataParallelTopology(2, 2).get_axis_comm_lists("pipe") == [[0, 2], [1, 3]]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="each needs a name"):
        ProcessTopology(["a"], [1, 2])
    with pytest.raises(ValueError, match="coordinates 0 to 1"):
        PipeDataParallelTopology(2, 1).get_rank(pipe=2, data=0)
