"""Checkpoints of models that are cut among ranks: model-parallel parts (`mpu`), and experts with a mesh of their
own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import ds_engine
import ds_zero
from ds_engine import CheckpointError, checkpoint
from ds_engine.checkpoint import Checkpoint, Content, write
from engine import jobs


class Mpu:
    """Two model-parallel ranks, side by side, and data-parallel ones of what is left."""

    def __init__(self) -> None:
        rank, self.size = dist.get_rank(), dist.get_world_size() // 2
        self.index, self.place = rank % 2, rank // 2
        data = [dist.new_group(list(range(i, 2 * self.size, 2))) for i in range(2)]
        model = [dist.new_group([2 * i, 2 * i + 1]) for i in range(self.size)]
        self.data, self.model, self.every = data[self.index], model[self.place], [*data, *model]

    def close(self) -> None:
        for group in self.every:
            if group is not dist.GroupMember.NON_GROUP_MEMBER:
                dist.destroy_process_group(group)

    def get_data_parallel_group(self) -> Any:
        return self.data

    def get_data_parallel_rank(self) -> int:
        return self.place

    def get_data_parallel_world_size(self) -> int:
        return self.size

    def get_model_parallel_group(self) -> Any:
        return self.model

    def get_model_parallel_rank(self) -> int:
        return self.index

    def get_model_parallel_world_size(self) -> int:
        return 2


class Part(nn.Module):
    """Half of the columns of a layer, under the same name on both; the second part has a parameter more, as a stage
    of a pipeline would; a frozen one, a buffer."""

    def __init__(self, index: int) -> None:
        super().__init__()
        whole = torch.randn(8, 6, generator=torch.Generator().manual_seed(5))
        self.weight = nn.Parameter(whole[4 * index : 4 * index + 4].clone())
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.alike = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.full((2,), float(index)), requires_grad=False)
        self.register_buffer("seen", torch.zeros(2) + index)
        if index:
            self.head = nn.Parameter(torch.arange(5.0))

    def forward(self, x: Tensor) -> Tensor:
        extra = self.head.square().sum() if hasattr(self, "head") else 0.0
        return (x @ self.weight.T).square().mean() + (self.alike * x[0, :3]).sum() + extra


def engine_of(mpu: Mpu | None, stage: int, **more: Any) -> ds_engine.Engine:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": stage},
        "startup_summary": False,
        **more,
    }
    made, *_ = ds_engine.initialize(model=Part(mpu.index if mpu else 0), config=config, mpu=mpu)
    made.progress.write = lambda line: None
    return made


def step(engine: ds_engine.Engine) -> None:
    # The same on every rank, so that the number of data-parallel ranks does not matter.
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(engine.global_steps))
    engine.backward(engine(x))
    engine.step()


def state_of(engine: ds_engine.Engine) -> dict[str, Tensor]:
    found = dict(ds_zero.full_state_dict(engine.module))
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            for kind in ("exp_avg", "exp_avg_sq"):
                found[f"{name}.{kind}"] = ds_zero.get_full(engine.module, name, kind)
    return found


def save_parts(folder: Path, stage: int, background: bool) -> None:
    mpu = Mpu()
    more = {"checkpoint": {"writer": {"decoupled": True}}} if background else {}
    engine = engine_of(mpu, stage, **more)
    step(engine)
    step(engine)
    engine.save_checkpoint(folder / "saved", client_state={"n": 7})
    engine.wait_for_checkpoint()
    step(engine)
    state = state_of(engine)
    if mpu.place == 0:
        torch.save(state, folder / f"after{mpu.index}.pt")
    engine.destroy()
    mpu.close()


def load_parts(folder: Path, stage: int) -> None:
    mpu = Mpu()
    engine = engine_of(mpu, stage)
    step(engine)
    _, client_state = engine.load_checkpoint(folder / "saved")
    assert client_state == {"n": 7} and engine.global_steps == 2
    step(engine)
    wanted, found = torch.load(folder / f"after{mpu.index}.pt"), state_of(engine)
    if mpu.place == 0:
        assert found.keys() == wanted.keys() and ("head" in found) == bool(mpu.index)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, msg=lambda text: f"{name}: {text}")  # noqa: B023
    engine.destroy()
    mpu.close()


def load_whole(folder: Path) -> None:
    with engine_of(None, 1) as engine:
        with pytest.raises(
            CheckpointError, match="cut into 2 along the axis 'tensor', this one is cut into 1: load it with"
        ):
            engine.load_checkpoint(folder / "saved")
        engine.save_checkpoint(folder / "whole")
    if dist.get_world_size() == 2:
        mpu = Mpu()
        with (
            engine_of(mpu, 1) as engine,
            pytest.raises(
                CheckpointError, match=r"cut into 1 along the axis 'tensor', this one is cut into 2"
            ),
        ):
            engine.load_checkpoint(folder / "whole")
        mpu.close()


@pytest.mark.parametrize(("stage", "background"), [(0, False), (2, True), (3, False)])
def test_parts_are_kept_apart_and_load_on_another_number_of_data_ranks(
    request: pytest.FixtureRequest, tmp_path: Path, stage: int, background: bool
) -> None:
    jobs.on_ranks(request, 4, save_parts, folder=tmp_path, stage=stage, background=background)
    jobs.on_ranks(request, 2, load_parts, folder=tmp_path, stage=stage)
    jobs.on_ranks(request, 4, load_parts, folder=tmp_path, stage=(stage + 1) % 4)
    with checkpoint.open_checkpoint(tmp_path / "saved") as opened:
        where = {(fqn, *entry.coordinates.items()) for fqn, _, entry in opened.manifest.entries()}
        parts = [("tensor", (0, 2)), ("tensor", (1, 2))]
        assert {("weight", parts[0]), ("weight", parts[1]), ("head", parts[1])} < where
        assert ("head", parts[0]) not in where and {axis for _, axis in where} == set(parts)
        assert list(opened.verify()) == []
    with pytest.raises(
        CheckpointError, match=r"holds the parts of a model that is cut among ranks \(tensor 2\)"
    ):
        checkpoint.state_dict(tmp_path / "saved")
    jobs.on_ranks(request, 2, load_whole, folder=tmp_path)


# --- experts


class Experts(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.dense = nn.Parameter(torch.arange(6.0))
        self.expert = nn.Parameter(torch.full((5,), float(index)))


def sharded(stage: int, filled: bool) -> tuple[nn.Module, torch.optim.Optimizer, int]:
    """Two expert-parallel ranks; the others hold the same experts."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "expert"))
    place = mesh["expert"].get_local_rank()
    model = Experts(place if filled else 9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True)
    config = ds_zero.ZeroConfig(persistence_threshold_numel=0)
    own = mesh["data"]
    ds_zero.shard(
        model, optimizer, stage, config=config, mesh_for=lambda name, _: own if name == "expert" else None
    )
    if filled:
        (model.dense.sum() * 2 + (model.expert * (place + 1)).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, place


def experts_of(model: nn.Module) -> dict[str, Tensor]:
    names = [(name, kind) for name in ("dense", "expert") for kind in ("param", "exp_avg")]
    return {f"{name}.{kind}": ds_zero.get_full(model, name, kind) for name, kind in names}


def save_experts(folder: Path, stage: int) -> None:
    model, optimizer, place = sharded(stage, filled=True)
    found = experts_of(model)
    assert found["expert.param"][0] == pytest.approx(place - 0.1, abs=0.02)
    write(folder, "tag", lambda: Content(records=ds_zero.records(model, optimizer)))
    if dist.get_rank() < 2:
        torch.save(found, folder / f"expert{place}.pt")


def load_experts(folder: Path, stage: int) -> None:
    model, optimizer, place = sharded(stage, filled=False)
    with Checkpoint(folder / "tag") as opened:
        where = {(fqn, *entry.coordinates.items()) for fqn, _, entry in opened.manifest.entries()}
        assert where == {("dense",), ("expert", ("expert", (0, 2))), ("expert", ("expert", (1, 2)))}
        ds_zero.load_records(model, optimizer, opened)
        assert opened.problems == []
    found = experts_of(model)
    for name, value in torch.load(folder / f"expert{place}.pt").items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("saved", "loaded"), [((4, 1), (2, 3)), ((2, 3), (4, 2))])
def test_experts_are_kept_apart(
    request: pytest.FixtureRequest, tmp_path: Path, saved: tuple[int, int], loaded: tuple[int, int]
) -> None:
    jobs.on_ranks(request, saved[0], save_experts, True, folder=tmp_path, stage=saved[1])
    jobs.on_ranks(request, loaded[0], load_experts, True, folder=tmp_path, stage=loaded[1])
