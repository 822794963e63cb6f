"""A value that one rank alone has changed is found at the next check, with step, rank and tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_checkpoint
import ds_comm
import ds_engine
import ds_zero
from ds_checkpoint import CheckpointError
from ds_comm.exchange.checked import MessageError, _Messages
from harness import ranks


def engine(stage: int, *, more: dict[str, Any] | None = None, **integrity: int) -> ds_engine.Engine:
    """The second layer is frozen."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": stage},
        "startup_summary": False,
        "integrity": integrity,
        **(more or {}),
    }
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].requires_grad_(False)
    return ds_engine.initialize(model=model, config=config)[0]


def train(made: ds_engine.Engine, steps: int) -> None:
    for _ in range(steps):
        made.backward(made(torch.ones(8, 8)).square().mean())
        made.step()


def damage(made: ds_engine.Engine, layer: int) -> None:
    if dist.get_rank() == 1:
        bias = made.module[layer].bias.detach()
        bias[3:4].view(torch.int32).bitwise_xor_(torch.tensor(1 << 20, dtype=torch.int32))


@ranks(3)
@pytest.mark.parametrize(("stage", "layer"), [(0, 0), (0, 1), (2, 1)])
def test_a_flipped_bit_in_a_value_that_stays_is_found_at_the_next_check(stage: int, layer: int) -> None:
    made = engine(stage, replica_check_interval=4)
    train(made, 5)
    damage(made, layer)
    train(made, 2)
    with pytest.raises(
        ds_zero.ReplicaError, match=rf"before step 8: .*'{layer}\.bias' is different on rank 1: "
    ):
        train(made, 1)
    assert made.global_steps == 7
    made.destroy()


@ranks(3)
def test_a_copy_that_the_next_step_would_replace_is_found_before_it() -> None:
    made = engine(2, replica_check_interval=1)
    train(made, 2)
    damage(made, 0)
    with pytest.raises(
        ds_zero.ReplicaError, match=r"before step 3: .*'0\.bias' is different on rank 1: 1 element"
    ):
        train(made, 1)
    made.destroy()


@ranks(2)
def test_zero_turns_the_check_off() -> None:
    made = engine(2, replica_check_interval=0)
    damage(made, 1)
    train(made, 4)
    with pytest.raises(ds_zero.ReplicaError):
        ds_zero.check_replicas(made.module)
    made.destroy()


def flip_shard(made: ds_engine.Engine, state: str | None) -> None:
    if dist.get_rank() == 1:
        shard = max((p for g in made.optimizer.param_groups for p in g["params"]), key=torch.Tensor.numel)
        values = shard.detach() if state is None else made.optimizer.state[shard][state]
        values.numpy().view("int32")[5] ^= 1 << 20


OFFLOAD = {
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "bf16": {"enabled": True},
}


@ranks(2)
@pytest.mark.parametrize(
    ("stage", "state", "more"),
    [(1, None, {"gradient_clipping": 0.1}), (2, "exp_avg", OFFLOAD), (3, "exp_avg_sq", {})],
)
def test_checksums_find_a_flipped_bit_of_a_shard(
    stage: int, state: str | None, more: dict[str, Any], tmp_path: Path
) -> None:
    made = engine(stage, checksums=True, more=more)
    train(made, 3)
    made.save_checkpoint(tmp_path / "good")
    flip_shard(made, state)
    what = rf"on rank 1, {state or 'master'} of '0\.bias', elements 0 to 7\."
    with pytest.raises(CheckpointError, match=f"ranks 0, 1: ChecksumError: .*{what}"):
        made.save_checkpoint(tmp_path / "bad")
    assert ds_checkpoint.latest(tmp_path / "good") and not ds_checkpoint.latest(tmp_path / "bad")
    with pytest.raises(ds_zero.ChecksumError, match=what):
        train(made, 1)
    assert made.global_steps == 3
    made.load_checkpoint(tmp_path / "good")
    train(made, 2)
    flip_shard(made, state)
    with pytest.raises(ds_zero.ChecksumError, match=what):
        train(made, 1)
    made.destroy()


@ranks(2)
def test_no_checksums_by_default() -> None:
    made = engine(2)
    train(made, 2)
    flip_shard(made, "exp_avg")
    train(made, 2)
    made.destroy()


def test_the_default_interval() -> None:
    made = engine(1)
    assert [step for step in range(1, 301) if made.job.is_check_due(step)] == [100, 200, 300]
    made.destroy()


class _Link:
    """Messages of which a bit flips while `faulty` is set, on the way from rank 0."""

    faulty = False

    def __init__(self, group: Any) -> None:
        self.group = group

    def exchange(self, tag: int) -> Any:
        return _LinkExchange(self.group, tag)


class _LinkExchange(_Messages):
    def reaches(self, rank: int) -> bool:
        return True

    def send(self, rank: int, tensors: Any) -> None:
        copies = [tensor.clone() for tensor in tensors]
        if _Link.faulty and dist.get_rank() == 0:
            copies[0].view(-1).view(torch.uint8)[1] ^= 16
        super().send(rank, copies)


@ranks(2)
def test_a_bit_flipped_on_the_way_is_found_at_once() -> None:
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": 2},
        "startup_summary": False,
        "integrity": {"message_checksums": True},
    }
    comm = ds_comm.Collectives(connect=lambda group, device, abort: _Link(group))
    made = ds_engine.initialize(nn.Linear(8, 8), config, comm=comm)[0]
    train(made, 2)
    made.backward(made(torch.ones(8, 8)).square().mean())
    _Link.faulty = True
    if dist.get_rank() == 1:
        with pytest.raises(MessageError, match="rank 1 of the group received other bits than rank 0 sent"):
            made.step()
    else:
        made.step()
    _Link.faulty = False
    made.destroy()
