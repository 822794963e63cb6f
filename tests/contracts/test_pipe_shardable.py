"""`ds_pipe.interfaces.Shardable`: pipelines whose stages are sharded by ds_zero, or by FSDP2."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import ds_zero
from ds_pipe.model import Pipeline
from harness import ranks
from pipe.model.test_pipeline import items, module, trained_alone

STEPS = 4


def data_group(built):
    """The ranks that have the same stages."""
    mine = None
    for line in built.process_topology.get_axis_comm_lists("data"):
        group = dist.new_group(line)
        if dist.get_rank() in line:
            mine = group
    return mine


def pipe_group(built):
    mine = None
    for line in built.process_topology.get_axis_comm_lists("pipe"):
        group = dist.new_group(line)
        if dist.get_rank() in line:
            mine = group
    return mine


def trained_by_ds_zero(stage, schedule, clip):
    built = module(2, schedule=schedule)
    optimizer = torch.optim.SGD(built.parameters(), lr=0.1, momentum=0.9)
    whole_model = ds_zero.ModelParallel(group=pipe_group(built), is_cut=lambda name, param: True)
    ds_zero.shard(built, optimizer, stage=stage, mesh=data_group(built), model_parallel=whole_model)
    control = ds_zero.control(built)
    pipeline = Pipeline(built, 4, shardable_for=lambda index: control)
    data_rank = built.process_topology.get_coord(dist.get_rank()).data
    losses = []
    for step in range(STEPS):
        losses.append(pipeline.forward_backward(items(step, data_rank, 4)).item())
        if clip is not None:
            ds_zero.clip_grad_norm_(built, clip)
        optimizer.step()
        optimizer.zero_grad()
    names = [name for name, _ in built.named_parameters()]
    with ds_zero.gathered(list(built.parameters())):
        values = {name: p.detach().clone() for name, p in built.named_parameters()}
    assert list(values) == names
    pipeline.close()
    ds_zero.destroy(built)
    return losses, values


CASES = [
    pytest.param(stage, schedule, clip, marks=[] if (stage, schedule, clip) in THIN else pytest.mark.full)
    for THIN in [
        {(0, "1f1b", None), (1, "zb-v", 0.5), (2, "1f1b", 0.5), (3, "1f1b", None), (3, "zb-v", None)}
    ]
    for stage in (0, 1, 2, 3)
    for schedule in ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "dualpipev")
    for clip in (None, 0.5)
]


@ranks(4, groups_may_stay=True)
@pytest.mark.parametrize("stage, schedule, clip", CASES)
def test_every_stage_of_ds_zero_inside_of_every_schedule(stage, schedule, clip):
    losses, values = trained_by_ds_zero(stage, schedule, clip)
    expected, weights = trained_alone(STEPS, 4, 2, False, clip)
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, value in values.items():
        torch.testing.assert_close(value, weights[name], rtol=1e-4, atol=1e-6)


@ranks(4, groups_may_stay=True)
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("zb-v", marks=pytest.mark.full)])
def test_fsdp2_inside_of_a_pipeline(schedule):
    built = module(2, schedule=schedule)
    mesh = DeviceMesh.from_group(data_group(built), "cpu", mesh_dim_names=("data",))
    stages = {index: built.stage_module(index) for index in built.local_stages}
    for stage in stages.values():
        fully_shard(stage, mesh=mesh)
    pipeline = Pipeline(built, 4, shardable_for=lambda index: stages[index])
    optimizer = torch.optim.SGD([p for s in stages.values() for p in s.parameters()], lr=0.1, momentum=0.9)
    data_rank = built.process_topology.get_coord(dist.get_rank()).data
    losses = []
    for step in range(STEPS):
        losses.append(pipeline.forward_backward(items(step, data_rank, 4)).item())
        optimizer.step()
        optimizer.zero_grad()
    expected, weights = trained_alone(STEPS, 4, 2, False, None)
    assert losses == pytest.approx(expected, rel=1e-5)
    for stage in stages.values():
        for name, param in stage.named_parameters():
            torch.testing.assert_close(param.full_tensor().detach(), weights[name], rtol=1e-4, atol=1e-6)
    pipeline.close()
