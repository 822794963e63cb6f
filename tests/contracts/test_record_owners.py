"""Owners of state: ds_zero's, the one of plain tensors and FSDP2, and a recording one, in one suite.

Each keeps a class of records of its own. Whatever an owner does, over all ranks every element of every logical tensor
is written exactly once, at one place, and comes back by name, coordinates and range.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

import ds_checkpoint
import ds_zero
from ds_checkpoint import CheckpointError, open_checkpoint
from ds_checkpoint.interfaces import RecordOwner, RecordSource, ShardRecord
from ds_checkpoint.owners import owner_of
from ds_checkpoint.read.checkpoint import Checkpoint
from ds_checkpoint.write import Content, write
from harness import ranks

Coordinates = Mapping[str, tuple[int, int]]


@dataclass
class Piece:
    """A record of somebody else's."""

    fqn: str
    state: str
    global_shape: tuple[int, ...]
    flat_offset: int
    data: Tensor
    coordinates: Coordinates = field(default_factory=dict)


class Recording:
    """Holds every tensor whole on every rank; rank 0 writes what is alike, each rank its own expert. Notes reads."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self.reads: list[tuple[str, str, Coordinates]] = []

    def _pieces(self) -> list[Piece]:
        pieces = []
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        for fqn, param in self._model.named_parameters():
            own = {"expert": (rank, num_ranks)} if fqn.startswith("expert") and num_ranks > 1 else {}
            for state, value in {"param": param.detach(), **self._optimizer.state[param]}.items():
                flat = value.detach().reshape(-1)
                pieces.append(Piece(fqn, state, tuple(value.shape), 0, flat, own))
        return pieces

    def records(self) -> Sequence[ShardRecord]:
        return [p for p in self._pieces() if dist.get_rank() == 0 or p.coordinates]

    def load_records(self, source: RecordSource) -> None:
        for piece in self._pieces():
            assert source.states(piece.fqn, piece.coordinates)[piece.state][0] == piece.global_shape
            source.read(piece.fqn, piece.state, 0, piece.data, piece.coordinates)
            self.reads.append((piece.fqn, piece.state, piece.coordinates))


class Model(nn.Module):
    """A dense layer that all ranks hold alike, and an expert; no count of ranks divides their sizes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.dense = nn.Linear(5, 3)
        self.expert = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.expert.weight.add_(dist.get_rank() if seed == 0 else 0)

    def forward(self) -> Tensor:
        """A loss in which the dense layer's gradient does not depend on the expert."""
        return self.dense(torch.ones(2, 5)).square().mean() + self.expert(torch.ones(2, 3)).square().mean()


def zero(model: nn.Module, optimizer: Optimizer, stage: int = 3) -> RecordOwner:
    """Each rank divides its expert with nobody."""
    alone = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("expert", "data"))["data"]
    config = ds_zero.ZeroConfig(persistence_threshold_numel=0)
    with_own = {"mesh_for": lambda name, _: alone if name.startswith("expert") else None}
    ds_zero.shard(model, optimizer, stage, config=config, **with_own)  # type: ignore[arg-type]
    return owner_of(model, optimizer)


def fsdp(model: nn.Module, optimizer: Optimizer) -> RecordOwner:
    for value in model.parameters():
        dist.broadcast(value.data, src=0)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    fully_shard(model)
    now = dict(model.named_parameters())
    for group, of in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [now[name] for name in of]
    return owner_of(model, optimizer)


def plain(model: nn.Module, optimizer: Optimizer) -> RecordOwner:
    for value in model.parameters():
        dist.broadcast(value.data, src=0)
    return owner_of(model, optimizer)


OWNERS: dict[str, Callable[[nn.Module, Optimizer], RecordOwner]] = {
    "zero": zero,
    "zero1": lambda model, optimizer: zero(model, optimizer, stage=1),
    "fsdp": fsdp,
    "plain": plain,
    "recording": Recording,
}
WITH_EXPERTS = ["zero", "zero1", "recording"]


def job(kind: str, seed: int, *, steps: int) -> tuple[nn.Module, Optimizer, RecordOwner]:
    model = Model(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)
    owner = OWNERS[kind](model, optimizer)
    for _ in range(steps):
        model().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, owner


def whole(kind: str, model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Every parameter and momentum of this rank's model, whole."""
    values = {}
    for name, param in model.named_parameters():
        for state in ("param", "momentum_buffer"):
            if kind.startswith("zero"):
                values[f"{name}/{state}"] = ds_zero.get_full(model, name, state)
                continue
            value: Any = param.detach() if state == "param" else optimizer.state[param][state]
            values[f"{name}/{state}"] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
    return values


def saved(owner: RecordOwner, folder: Path) -> Path:
    records = owner.records()
    return Path(write(folder, "tag", lambda: Content(records=records)))


@ranks(1, 3, groups_may_stay=True)
@pytest.mark.parametrize("kind", list(OWNERS))
def test_all_is_written_once_and_comes_back(kind: str, tmp_path: Path) -> None:
    """`write` refuses elements that are missing or there twice."""
    model, optimizer, owner = job(kind, 0, steps=2)
    for record in owner.records():
        assert record.data.ndim == 1 and record.data.is_contiguous()
        assert all(0 <= index < size > 1 for index, size in record.coordinates.values())
    path = saved(owner, tmp_path)
    expected = whole(kind, model, optimizer)
    with Checkpoint(path) as checkpoint:
        assert list(checkpoint.verify()) == []
        assert set(checkpoint.manifest.tensors) == {"dense.weight", "dense.bias", "expert.weight"}
        here = {"expert": (dist.get_rank(), dist.get_world_size())}
        for name, value in expected.items():
            fqn, _, state = name.partition("/")
            own = (
                here
                if kind in WITH_EXPERTS and fqn.startswith("expert") and dist.get_world_size() > 1
                else {}
            )
            assert torch.equal(checkpoint.tensor(fqn, state, own).view_as(value), value), name
    other, other_optimizer, other_owner = job(kind, 9, steps=1)
    with Checkpoint(path) as checkpoint:
        other_owner.load_records(checkpoint)
        assert checkpoint.problems == []
        for record in other_owner.records():
            end = record.flat_offset + record.data.numel()
            asked = (record.fqn, record.state, record.flat_offset, end, record.coordinates)
            assert checkpoint.was_read(*asked), asked
    found = whole(kind, other, other_optimizer)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@ranks(3, groups_may_stay=True)
@pytest.mark.parametrize(("writer", "reader"), [("zero", "recording"), ("recording", "zero1")])
def test_one_owner_reads_what_another_has_written(writer: str, reader: str, tmp_path: Path) -> None:
    model, optimizer, owner = job(writer, 0, steps=2)
    path = saved(owner, tmp_path)
    other, other_optimizer, other_owner = job(reader, 9, steps=1)
    with Checkpoint(path) as checkpoint:
        other_owner.load_records(checkpoint)
    expected, found = whole(writer, model, optimizer), whole(reader, other, other_optimizer)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    if isinstance(other_owner, Recording):
        rank = dist.get_rank()
        assert ("expert.weight", "param", {"expert": (rank, 3)}) in other_owner.reads
        assert ("dense.bias", "momentum_buffer", {}) in other_owner.reads


@ranks(2, groups_may_stay=True)
@pytest.mark.parametrize("kind", list(OWNERS))
def test_values_that_differ_along_an_axis_of_another_size_are_refused(kind: str, tmp_path: Path) -> None:
    """The error is the same for all owners, and nothing of the model has changed."""
    rank, has_experts = dist.get_rank(), kind in WITH_EXPERTS
    model, optimizer, owner = job(kind, 0, steps=1)
    before = whole(kind, model, optimizer)
    mine = list(owner.records())
    for size in (4, 1) if has_experts else (4,):
        own = {"expert": (rank if has_experts else 0, size)} if size > 1 else {}
        pieces = [
            Piece(r.fqn, r.state, r.global_shape, r.flat_offset, r.data, own if "expert" in r.fqn else {})
            for r in mine
            if size > 1 or rank == 0 or not r.coordinates  # one expert alone, the first rank's
        ]
        path = Path(write(tmp_path / str(size), "tag", lambda pieces=pieces: Content(records=pieces)))  # type: ignore[misc]
        here = 2 if has_experts else 1
        said = rf"of 'expert.weight' differ along the axis 'expert', which has size {size} .* and {here} in this job"
        with Checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match=said):
            owner.load_records(checkpoint)
        if kind != "recording":  # which has no second thoughts
            after = whole(kind, model, optimizer)
            assert all(torch.equal(after[name], value) for name, value in before.items())


@ranks(2, groups_may_stay=True)
def test_a_checkpoint_with_experts_goes_through_save_and_load(tmp_path: Path) -> None:
    model, optimizer, _ = job("zero", 0, steps=2)
    ds_checkpoint.save(tmp_path, model, optimizer)
    expected = whole("zero", model, optimizer)
    other, other_optimizer, _ = job("zero1", 9, steps=0)
    ds_checkpoint.load(tmp_path, other, other_optimizer)
    found = whole("zero1", other, other_optimizer)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.verify()) == []
    with pytest.raises(CheckpointError, match=r"several values under one name: param of 'expert.weight'"):
        ds_checkpoint.state_dict(tmp_path)
