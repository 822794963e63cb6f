"""Meshes over the ranks of the harness."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import ds_comm
from harness import ranks


@ranks(1, 2, 4)
def test_the_data_axis_covers_all_ranks(world_size: int) -> None:
    mesh = ds_comm.data_mesh(ds_comm.start(device="cpu"))
    assert mesh.mesh_dim_names == ("data",)
    assert mesh["data"].size() == world_size
    x = torch.ones(2)
    dist.all_reduce(x, group=mesh.get_group("data"))
    assert x.tolist() == [world_size] * 2


@ranks(4, groups_may_stay=True)
def test_two_axes() -> None:
    world = ds_comm.start(device="cpu")
    mesh = ds_comm.data_mesh(world, axes={"data": 2, "tensor": 2})
    assert mesh.mesh.tolist() == [[0, 1], [2, 3]]  # neighbours share the last axis
    x = torch.tensor(float(world.rank))
    dist.all_reduce(x, group=mesh.get_group("tensor"))
    assert x.item() == {0: 1.0, 1: 1.0, 2: 5.0, 3: 5.0}[world.rank]


@pytest.mark.parametrize("axes", [{"data": 3}, {"data": 2, "tensor": 3}, {"data": -2, "tensor": -2}, {}])
def test_axes_that_do_not_cover_the_ranks(axes: dict[str, int]) -> None:
    world = ds_comm.World(
        rank=0,
        world_size=4,
        local_rank=0,
        local_size=4,
        device=torch.device("cpu"),
        backend="gloo",
        source="single",
    )
    with pytest.raises(ValueError, match="does not cover 4 ranks"):
        ds_comm.data_mesh(world, axes)
