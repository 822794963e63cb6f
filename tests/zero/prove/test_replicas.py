"""One flipped bit in a replicated value is found, and its rank, tensor and element are named."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import ds_zero
from ds_zero import _registry
from harness import ranks
from zero.models import Tiny, batch


def trained(
    stage: int, *, rows: int = 0, bf16: bool = False
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Tiny(dim=48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    mesh = None
    if rows:
        mesh = init_device_mesh(
            "cpu", (rows, dist.get_world_size() // rows), mesh_dim_names=("replicate", "shard")
        )
    config = ds_zero.ZeroConfig(reduce_bucket_numel=4000, param_dtype=torch.bfloat16 if bf16 else None)
    ds_zero.shard(model, optimizer, stage, mesh, config=config)
    train(model, optimizer, 2)
    return model, optimizer


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        model(*batch(step, dist.get_rank())).backward()
        optimizer.step()
        optimizer.zero_grad()


def flip(values: Tensor, index: int, bit: int) -> None:
    """Changes one bit in memory, past torch."""
    word = {4: torch.int32, 2: torch.int16}[values.element_size()]
    values.detach().view(-1)[index : index + 1].view(word).bitwise_xor_(torch.tensor(1 << bit, dtype=word))


def caught(model: torch.nn.Module) -> str:
    with pytest.raises(ds_zero.ReplicaError) as error:
        ds_zero.check_replicas(model)
    said: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(said, str(error.value))
    assert len(set(said)) == 1, "all ranks say the same"
    return said[0]


@ranks(3)
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_replicated_is_equal_after_training(stage: int, bf16: bool) -> None:
    model, _ = trained(stage, bf16=bf16)
    ds_zero.check_replicas(model)


@ranks(3)
@pytest.mark.parametrize(("stage", "bf16"), [(0, False), (1, True), (2, False)])
def test_a_flipped_bit_of_a_parameter(stage: int, bf16: bool) -> None:
    model, _ = trained(stage, bf16=bf16)
    name, param = list(model.named_parameters())[1]
    before = param.detach().view(-1)[5].item()
    if dist.get_rank() == 1:
        flip(param, 5, 3)
    after = [0.0]
    after[0] = param.detach().view(-1)[5].item()
    dist.broadcast_object_list(after, src=1)
    said = caught(model)
    assert f"parameter of {name!r} is different on rank 1: 1 element, the first is number 5: " in said
    assert f"{after[0]:.9g} instead of {before:.9g}, a single bit" in said
    if dist.get_rank() == 1:
        flip(param, 5, 3)
    ds_zero.check_replicas(model)


@ranks(2)
def test_with_two_ranks_nobody_has_the_majority() -> None:
    model, _ = trained(1)
    name, param = next(iter(model.named_parameters()))
    if dist.get_rank() == 1:
        flip(param, 0, 30)
    said = caught(model)
    assert f"parameter of {name!r} differs, and no majority of ranks agrees: 1 element" in said
    assert "on rank 0" in said and "on rank 1" in said


@ranks(3)
def test_a_state_of_the_optimizer_at_stage_0() -> None:
    model, optimizer = trained(0)
    shard = optimizer.param_groups[0]["params"][2]
    if dist.get_rank() == 2:
        flip(optimizer.state[shard]["exp_avg"], 1, 12)
    assert "exp_avg of " in (said := caught(model)) and "is different on rank 2: 1 element" in said


@ranks(4, groups_may_stay=True)
def test_rows_of_a_mesh_hold_the_same_shards() -> None:
    model, _ = trained(3, rows=2, bf16=True)
    ds_zero.check_replicas(model)
    bucket = next(b for b in _registry.state_of(model).buckets if not b.whole)
    if dist.get_rank() == 3:
        with bucket.storage.opened("master") as master:
            flip(master, 0, 8)
    said = caught(model)
    assert "master of " in said and "no majority" in said and "on rank 1" in said and "on rank 3" in said


@ranks(2)
def test_a_rank_that_updates_alone_is_found() -> None:
    model, _ = trained(2)
    with torch.no_grad():
        if dist.get_rank() == 0:
            for param in model.parameters():
                param.mul_(1.5)
    said = caught(model)
    assert "further tensors may differ" in said and "under `if rank == 0`" in said


@ranks(2)
def test_ranks_with_other_states_are_refused() -> None:
    model, optimizer = trained(0)
    if dist.get_rank() == 1:
        optimizer.state[optimizer.param_groups[0]["params"][0]]["extra"] = torch.zeros(3)
    with pytest.raises(ds_zero.ReplicaError, match="ranks hold different states: "):
        ds_zero.check_replicas(model)


def test_one_process_compares_nothing() -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ds_zero.shard(model, optimizer, 1)
    ds_zero.check_replicas(model)
    with pytest.raises(ValueError, match="is not sharded"):
        ds_zero.check_replicas(torch.nn.Linear(2, 2))
