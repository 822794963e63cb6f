"""`save` and `load` without an engine: plain models, FSDP2's and ds_zero's, on any number of ranks."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

import ds_checkpoint
import ds_zero
from ds_checkpoint import CheckpointError
from harness import ranks

KINDS = ["plain", "fsdp", "zero1", "zero3"]


class Net(nn.Module):
    """Sizes that no number of ranks divides; a tied, a frozen and a 0-dim parameter, a buffer, some randomness."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.up = nn.Linear(5, 9)
        self.drop = nn.Dropout(0.2)
        self.down = nn.Linear(9, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.arange(5.0), requires_grad=False)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.frozen
        x = x + self.down(self.drop(torch.relu(self.up(x))))
        self.seen += 1
        return nn.functional.cross_entropy(self.head(x), tokens)


def make(kind: str, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model: nn.Module = Net()
    if kind == "fsdp":
        for part in (model.up, model.down):
            fully_shard(part)
        fully_shard(model)
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": params[:2], "weight_decay": 0.0}, {"params": params[2:]}]
    optimizer = torch.optim.AdamW(groups, lr=0.02, foreach=True)
    if kind.startswith("zero"):
        ds_zero.shard(model, optimizer, stage=int(kind[-1]))
    elif kind == "plain" and dist.get_world_size() > 1:
        for p in model.parameters():
            dist.broadcast(p.data, src=0)
    return model, optimizer


def train(kind: str, model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """The same batch on every rank, so that the number of ranks changes roundings only."""
    for step in steps:
        torch.manual_seed(step)
        tokens = torch.randint(0, 7, (12,))
        model(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(kind: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    if kind.startswith("zero"):
        values = ds_zero.full_state_dict(model)
        for name, p in model.named_parameters():
            if p.requires_grad:
                values[f"{name}/exp_avg"] = ds_zero.get_full(model, name, "exp_avg")
        return values

    def full(value: Tensor) -> Tensor:
        return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()

    values = {name: full(value) for name, value in model.state_dict().items()}
    for name, p in model.named_parameters():
        if p.requires_grad:
            values[f"{name}/exp_avg"] = full(optimizer.state[p]["exp_avg"])
    return values


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


@ranks(1, 2, 4, groups_may_stay=True)
@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_bitwise(kind: str, tmp_path: Path) -> None:
    model, optimizer = make(kind)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    train(kind, model, optimizer, range(2))
    scheduler.step()
    path = ds_checkpoint.save(
        tmp_path, model, optimizer, {"step": 2, "scheduler": scheduler, "x": torch.ones(2)}
    )
    assert Path(path) == tmp_path / "save000001" and ds_checkpoint.latest(tmp_path) == "save000001"
    drawn = torch.rand(3), random.random()
    train(kind, model, optimizer, range(2, 4))
    expected = whole(kind, model, optimizer)

    other, other_optimizer = make(kind, seed=9)
    train(kind, other, other_optimizer, range(1))
    other_scheduler = torch.optim.lr_scheduler.StepLR(other_optimizer, 2, 0.5)
    for group in other_optimizer.param_groups:
        group["lr"] = 5.0
    extra: dict[str, Any] = {"scheduler": other_scheduler}
    saved = ds_checkpoint.load(tmp_path, other, other_optimizer, extra)
    assert saved["step"] == extra["step"] == 2 and torch.equal(extra["x"], torch.ones(2))
    assert other_scheduler.last_epoch == 1 and extra["scheduler"] is other_scheduler
    assert [g["weight_decay"] for g in other_optimizer.param_groups] == [0.0, 0.01]
    assert torch.equal(torch.rand(3), drawn[0]) and random.random() == drawn[1]
    train(kind, other, other_optimizer, range(2, 4))
    same(whole(kind, other, other_optimizer), expected)


@ranks(2, groups_may_stay=True)
@pytest.mark.parametrize(
    ("saved_as", "loaded_as"), [("plain", "fsdp"), ("fsdp", "zero3"), ("zero3", "plain")]
)
def test_another_kind_of_model(saved_as: str, loaded_as: str, tmp_path: Path) -> None:
    model, optimizer = make(saved_as)
    train(saved_as, model, optimizer, range(2))
    ds_checkpoint.save(tmp_path, model, optimizer)
    other, other_optimizer = make(loaded_as, seed=9)
    ds_checkpoint.load(tmp_path, other, other_optimizer)
    expected, found = whole(saved_as, model, optimizer), whole(loaded_as, other, other_optimizer)
    names = expected.keys() & found.keys()  # shared parameters appear once or twice
    assert len(names) >= (12 if dist.get_rank() == 0 else 5)  # ds_zero gives whole values to rank 0
    same({n: expected[n] for n in names}, {n: found[n] for n in names})
    train(loaded_as, other, other_optimizer, range(2, 3))


@ranks(4, groups_may_stay=True)
@pytest.mark.parametrize("kind", ["plain", "fsdp", "zero3"])
def test_another_number_of_ranks(kind: str, tmp_path: Path) -> None:
    """Written on four ranks, read by the first alone: the values are those, and so are the files for any count."""
    model, optimizer = make(kind)
    train(kind, model, optimizer, range(2))
    expected = whole(kind, model, optimizer)
    ds_checkpoint.save(tmp_path, model, optimizer)
    with ds_checkpoint.open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.verify()) == []
        for name, value in expected.items():
            fqn, _, state = name.partition("/")
            if fqn in checkpoint.manifest.tensors:
                state = state or ("buffer" if fqn == "seen" else "param")
                assert torch.equal(checkpoint.tensor(fqn, state), value), name


@ranks(4, groups_may_stay=True)
def test_tensors_that_are_divided_by_columns(tmp_path: Path) -> None:
    """Two ranks have a half of each row each, and two more the same: ranges that no rank has in one piece."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))

    def job(columns: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        by_columns = {"shard_placement_fn": lambda p: Shard(p.ndim - 1)} if columns else {}
        fully_shard(model, mesh=mesh, **by_columns)
        return model, torch.optim.AdamW(model.parameters(), lr=0.02, foreach=True)

    torch.manual_seed(0)
    model, optimizer = job(columns=True)
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    ds_checkpoint.save(tmp_path, model, optimizer)
    expected = whole("fsdp", model, optimizer)
    with ds_checkpoint.open_checkpoint(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.tensor("0.weight"), expected["0.weight"])
        assert torch.equal(checkpoint.tensor("0.weight", "exp_avg"), expected["0.weight/exp_avg"])
    for columns in (True, False):
        other, other_optimizer = job(columns)
        ds_checkpoint.load(tmp_path, other, other_optimizer)
        same(whole("fsdp", other, other_optimizer), expected)


@ranks(2)
def test_a_model_alone_and_names_that_wrappers_change(tmp_path: Path) -> None:
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    ds_checkpoint.save(tmp_path, model)
    plain = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    assert ds_checkpoint.load(tmp_path, torch.compile(plain, backend="eager")) == {}
    same(dict(plain.state_dict()), dict(model.module.state_dict()))
    with pytest.raises(CheckpointError, match="no optimizer states: pass optimizer=None"):
        ds_checkpoint.load(tmp_path, plain, torch.optim.SGD(plain.parameters()))


@ranks(2)
def test_what_only_one_rank_has_is_written_by_it(tmp_path: Path) -> None:
    """Stages of a pipeline: modules with names of their own."""
    rank = dist.get_rank()
    model = nn.ModuleDict({"shared": nn.Linear(2, 2), f"stage{rank}": nn.Linear(3, 3)})
    with torch.no_grad():
        model[f"stage{rank}"].weight.fill_(rank + 1)
    ds_checkpoint.save(tmp_path, model)
    other = nn.ModuleDict({"shared": nn.Linear(2, 2), f"stage{rank}": nn.Linear(3, 3)})
    ds_checkpoint.load(tmp_path, other)
    assert torch.equal(other[f"stage{rank}"].weight, torch.full((3, 3), rank + 1.0))


@ranks(2)
@pytest.mark.parametrize("optimizer", ["sgd", "rprop", "adafactor", "radam"])
def test_other_optimizers(optimizer: str, tmp_path: Path) -> None:
    make_one: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
        "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
        "radam": lambda p: torch.optim.RAdam(p, lr=0.1),
    }

    def job() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = Net()
        return model, make_one[optimizer]([p for p in model.parameters() if p.requires_grad])

    torch.manual_seed(0)
    model, opt = job()
    train("plain", model, opt, range(2))
    ds_checkpoint.save(tmp_path, model, opt)
    train("plain", model, opt, range(2, 4))
    other, other_opt = job()
    ds_checkpoint.load(tmp_path, other, other_opt)
    train("plain", other, other_opt, range(2, 4))
    same(dict(other.state_dict()), dict(model.state_dict()))


@ranks(2)
def test_what_does_not_fit_is_refused_on_every_rank_and_changes_nothing(tmp_path: Path) -> None:
    model, optimizer = make("plain")
    train("plain", model, optimizer, range(1))
    ds_checkpoint.save(tmp_path, model, optimizer)
    before = whole("plain", model, optimizer)
    larger = Net()
    larger.more = nn.Linear(2, 2)
    with pytest.raises(
        CheckpointError, match=r"lacks 2 of \d+ tensors of the model, the first are \['more.weight'"
    ):
        ds_checkpoint.load(tmp_path, larger)
    smaller = nn.ModuleDict({"up": nn.Linear(5, 9)})
    with pytest.raises(CheckpointError, match=r"has 5 tensors that the model lacks.*strict=False"):
        ds_checkpoint.load(tmp_path, smaller)
    ds_checkpoint.load(tmp_path, smaller, strict=False)
    assert torch.equal(smaller["up"].weight, before["up.weight"])
    with pytest.raises(
        CheckpointError, match=r"groups of \[1\] parameters, the checkpoint has groups of \[2, 3\]"
    ):
        ds_checkpoint.load(tmp_path, model, torch.optim.AdamW([model.up.weight]))
    params = list(model.parameters())
    with pytest.raises(
        CheckpointError, match="of the family 'adam', but this optimizer is of the family 'sgd'"
    ):
        ds_checkpoint.load(
            tmp_path, model, torch.optim.SGD([{"params": params[:2]}, {"params": params[2:5]}])
        )
    with pytest.raises(
        CheckpointError, match=r"param_groups\[0\]\['params'\]\[0\].*is not a parameter of this model"
    ):
        ds_checkpoint.save(tmp_path, model, torch.optim.SGD(Net().parameters()))
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        ds_checkpoint.load(tmp_path / "nothing", model)
    same(whole("plain", model, optimizer), before)


@ranks(2)
def test_an_error_on_one_rank_is_raised_on_all_and_leaves_nothing(tmp_path: Path) -> None:
    model, optimizer = make("plain")
    with pytest.raises(CheckpointError, match=r"rank 0: ValueError: extra\['model'\] is a"):
        ds_checkpoint.save(tmp_path, model, optimizer, {"model": object()} if dist.get_rank() == 0 else None)
    if dist.get_rank() == 1:
        train_alone = torch.optim.SGD(model.parameters(), momentum=0.5)
        train_alone.state[next(model.parameters())]["odd"] = object()
        optimizer = train_alone
    with pytest.raises(CheckpointError, match=r"rank 1: ValueError: optimizer state 'odd' of parameter"):
        ds_checkpoint.save(tmp_path, model, optimizer)
    dist.barrier()
    assert list(tmp_path.iterdir()) == []


def test_damage_is_found(tmp_path: Path) -> None:
    model = Net()
    path = Path(ds_checkpoint.save(tmp_path, model))
    file = next(path.glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match="are damaged"):
        ds_checkpoint.load(tmp_path, Net())


def test_tags_and_pruning(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    for value in range(4):
        with torch.no_grad():
            model.weight.fill_(value)
        ds_checkpoint.save(tmp_path, model, keep_last=2)
    assert {p.name for p in tmp_path.iterdir()} == {"save000003", "save000004", "latest"}
    ds_checkpoint.load(tmp_path, model, tag="save000003")
    assert torch.equal(model.weight, torch.full((2, 2), 2.0))
    ds_checkpoint.load(tmp_path / "save000004", model)
    assert torch.equal(model.weight, torch.full((2, 2), 3.0))
