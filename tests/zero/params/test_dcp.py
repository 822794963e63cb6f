"""torch.distributed.checkpoint with sharded models: any stage, any number of ranks, and files of ordinary models."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

import ds_zero
from ds_zero import _registry
from engine import jobs
from harness import ranks

OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2, foreach=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, foreach=True),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=1e-2),
}


class Net(nn.Module):
    """Sizes that no number of ranks divides; 0 to 4 dims, a shared and a frozen parameter, a buffer."""

    def __init__(self, seed: int, scale_shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(7, 5)
        self.conv = nn.Conv2d(1, 3, (2, 3))
        self.up = nn.Linear(5, 9)
        self.down = nn.Linear(9, 5)
        self.scale = nn.Parameter(torch.full(scale_shape, 1.5 + seed))
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.register_buffer("seen", torch.zeros(3) + seed)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.frozen
        x = x + self.down(torch.relu(self.up(x))) * self.scale
        extra = self.conv(x.detach()[None, None].to(x.dtype)).square().mean()
        return nn.functional.cross_entropy(self.head(x).float(), tokens) + extra.float()


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    params = [p for p in model.parameters() if p.requires_grad]
    return [{"params": params[:2], "weight_decay": 0.0}, {"params": params[2:]}]


def job(
    stage: int | str,
    kind: str = "adamw",
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    steps: int = 0,
    scale_shape: tuple[int, ...] = (),
) -> tuple[nn.Module, Optimizer]:
    model: nn.Module = Net(seed, scale_shape)
    if stage == "fsdp":
        fully_shard(model)
    optimizer: Optimizer = OPTIMIZERS[kind](groups_of(model))
    if isinstance(stage, int):
        config = ds_zero.ZeroConfig(param_dtype=dtype, persistence_threshold_numel=0)
        ds_zero.shard(model, optimizer, stage, config=config)
    train(model, optimizer, range(steps))
    return model, optimizer


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    """The same batch on every rank, so that the number of ranks does not matter."""
    for step in steps:
        tokens = torch.randint(0, 7, (12,), generator=torch.Generator().manual_seed(step))
        model(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


STATES = {
    "adamw": ("exp_avg", "exp_avg_sq", "step"),
    "sgd": ("momentum_buffer",),
    "adafactor": (),  # of a form of its own: compared by training on
}


def whole(model: nn.Module, optimizer: Optimizer, kind: str = "adamw") -> dict[str, Tensor]:
    """Every master, buffer and state of a sharded model, on every rank."""
    values = {"seen": model.get_buffer("seen").clone()}
    for name, param in model.named_parameters():
        values[name] = ds_zero.get_full(model, name, "param").clone()
        for state in STATES[kind] if param.requires_grad else ():
            if state != "step":
                values[f"{name}/{state}"] = ds_zero.get_full(model, name, state).clone()
    values["lr"] = torch.tensor([group["lr"] for group in optimizer.param_groups])
    values["decay"] = torch.tensor([group["weight_decay"] for group in optimizer.param_groups])
    return values


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def save_job(folder: Path, stage: int, kind: str, bf16: bool) -> None:
    model, optimizer = job(stage, kind, dtype=torch.bfloat16 if bf16 else None, steps=2)
    optimizer.param_groups[1]["lr"] = 0.005
    dcp.save(ds_zero.dcp_state_dict(model, optimizer), checkpoint_id=folder / "c")
    saved = whole(model, optimizer, kind)
    train(model, optimizer, range(2, 4))
    if dist.get_rank() == 0:
        torch.save((saved, whole_first(model)), folder / "expected.pt")
    else:
        whole_first(model)
    ds_zero.destroy(model)


def whole_first(model: nn.Module) -> dict[str, Tensor]:
    return {name: ds_zero.get_full(model, name, "param").clone() for name, _ in model.named_parameters()}


def load_job(folder: Path, stage: int, kind: str, bf16: bool, steps: int) -> None:
    model, optimizer = job(stage, kind, seed=3, dtype=torch.bfloat16 if bf16 else None, steps=steps)
    dcp.load(ds_zero.dcp_state_dict(model, optimizer), checkpoint_id=folder / "c")
    saved, after = torch.load(folder / "expected.pt")
    assert not differing(whole(model, optimizer, kind), saved)
    train(model, optimizer, range(2, 4))
    for name, value in whole_first(model).items():
        torch.testing.assert_close(value, after[name], rtol=1e-5, atol=1e-6, msg=f"{name}, trained on")
    ds_zero.destroy(model)


@pytest.mark.parametrize(
    ("kind", "bf16", "saved", "loaded"),
    [
        ("adamw", False, (2, 3), [(1, 1, 0), (3, 3, 1), (2, 0, 0)]),
        ("adamw", True, (2, 1), [(3, 2, 0)]),
        ("sgd", False, (3, 0), [(2, 3, 0)]),
        ("adafactor", False, (2, 2), [(1, 3, 0)]),
    ],
)
def test_another_number_of_ranks_and_another_stage(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    kind: str,
    bf16: bool,
    saved: tuple[int, int],
    loaded: list[tuple[int, int, int]],
) -> None:
    """Ranks, stage, and steps before the load: 0 has no states yet."""
    jobs.on_ranks(request, saved[0], save_job, folder=tmp_path, stage=saved[1], kind=kind, bf16=bf16)
    for num_ranks, stage, steps in loaded:
        arguments = {"folder": tmp_path, "stage": stage, "kind": kind, "bf16": bf16, "steps": steps}
        jobs.on_ranks(request, num_ranks, load_job, **arguments)


@ranks(2)
def test_no_rank_writes_or_copies_more_than_its_own(tmp_path: Path) -> None:
    model, optimizer = job(3, steps=1)
    entries = {name: value.state_dict() for name, value in ds_zero.dcp_state_dict(model, optimizer).items()}
    masters = {
        b.storage.addressable("master").untyped_storage().data_ptr()
        for b in _registry.state_of(model).buckets
        if b.trainable
    }
    for name, entry in entries["model"].items():
        if name not in ("frozen", "seen"):
            assert {view.untyped_storage().data_ptr() for _, view, _ in entry.blocks_held} <= masters, name
    own = sum(b.owned_range[1] - b.owned_range[0] for b in _registry.state_of(model).buckets)
    dcp.save(ds_zero.dcp_state_dict(model, optimizer), checkpoint_id=tmp_path)
    sizes = dcp.FileSystemReader(tmp_path).read_metadata().storage_data
    mine = sum(
        info.length
        for index, info in sizes.items()
        if info.relative_path.startswith(f"__{dist.get_rank()}_") and index.fqn.endswith(("weight", "bias"))
    )
    assert (
        0 < mine < 3 * 4 * own + 20_000
    )  # the shared weight is there twice; torch adds about 1 kB to a block


@ranks(2)
def test_saved_before_the_first_step_is_fresh_afterwards(tmp_path: Path) -> None:
    model, optimizer = job(2)
    dcp.save(ds_zero.dcp_state_dict(model, optimizer), checkpoint_id=tmp_path)
    assert not optimizer.state
    train(model, optimizer, range(2))
    expected = whole(model, optimizer)
    dcp.load(ds_zero.dcp_state_dict(model, optimizer), checkpoint_id=tmp_path)
    assert not any(optimizer.state.values())
    train(model, optimizer, range(2))
    assert not differing(whole(model, optimizer), expected)


@ranks(2)
def test_an_asynchronous_save_holds_the_values_of_its_call(tmp_path: Path) -> None:
    group = dist.new_group(backend="gloo")
    model, optimizer = job(3, steps=1)
    expected = whole(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about storages
        future: Any = dcp.async_save(
            ds_zero.dcp_state_dict(model, optimizer), checkpoint_id=tmp_path, process_group=group
        )
    train(model, optimizer, range(1, 3))
    future.result()
    assert differing(whole(model, optimizer), expected)
    dcp.load(ds_zero.dcp_state_dict(model, optimizer), checkpoint_id=tmp_path)
    assert not differing(whole(model, optimizer), expected)
    dist.destroy_process_group(group)


def exchanged(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """torch's state dict of an ordinary model, or one of FSDP2's."""
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }


@ranks(2, groups_may_stay=True)
@pytest.mark.parametrize("other", ["plain", "fsdp"])
def test_files_are_exchanged_with_models_that_are_not_sharded_by_us(other: str, tmp_path: Path) -> None:
    shape = (1,) if other == "fsdp" else ()  # FSDP2 takes no parameter of 0 dims
    model, optimizer = job(other, steps=2, scale_shape=shape)
    dcp.save(exchanged(model, optimizer), checkpoint_id=tmp_path / "theirs")
    ours, our_optimizer = job(3, seed=3, scale_shape=shape)
    dcp.load(ds_zero.dcp_state_dict(ours, our_optimizer), checkpoint_id=tmp_path / "theirs")
    for start in (2, 4):
        train(model, optimizer, range(start, start + 2))
        train(ours, our_optimizer, range(start, start + 2))
        for name, param in model.named_parameters():
            value = param.full_tensor() if other == "fsdp" else param  # type: ignore[operator]
            found = ds_zero.get_full(ours, name, "param")
            torch.testing.assert_close(found, value.detach(), rtol=1e-4, atol=1e-5, msg=f"{name}, {start}")
        # The other way: what ours has written, into the model that is not.
        dcp.save(ds_zero.dcp_state_dict(ours, our_optimizer), checkpoint_id=tmp_path / f"ours{start}")
        model, optimizer = job(other, seed=4, scale_shape=shape)
        state = exchanged(model, optimizer)
        dcp.load(state, checkpoint_id=tmp_path / f"ours{start}")
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, optim_state_dict=state["optimizer"])


@ranks(2)
@pytest.mark.parametrize("stage", [1, 3])
def test_what_a_plain_model_has_saved_without_a_prefix(stage: int, tmp_path: Path) -> None:
    plain = Net(2)
    with torch.no_grad():
        plain.frozen.copy_(plain.frozen.bfloat16())  # has no fp32 master
    dcp.save(plain.state_dict(), checkpoint_id=tmp_path / "plain")
    model, optimizer = job(stage, dtype=torch.bfloat16, steps=1)
    dcp.load(ds_zero.dcp_state_dict(model, bare_names=True), checkpoint_id=tmp_path / "plain")
    for name, param in plain.named_parameters():
        assert torch.equal(ds_zero.get_full(model, name, "param"), param), name
    with ds_zero.gathered(model):  # published: what computes is what was loaded
        assert torch.equal(model.up.weight, plain.up.weight.bfloat16())
    dcp.save(ds_zero.dcp_state_dict(model, bare_names=True), checkpoint_id=tmp_path / "ours")
    again = Net(5).state_dict()
    dcp.load(again, checkpoint_id=tmp_path / "ours")
    assert not differing(again, plain.state_dict())
    with pytest.raises(ValueError, match="bare_names is for the model alone"):
        ds_zero.dcp_state_dict(model, optimizer, bare_names=True)


@ranks(2)
@pytest.mark.parametrize(("stage", "steps"), [(0, 0), (1, 1), (3, 0), (3, 1)])
def test_functions_of_torch_that_cannot_work_name_what_does(stage: int, steps: int) -> None:
    model, optimizer = job(stage, steps=steps)
    before = whole(model, optimizer) if steps else whole_first(model)
    rates = [group["lr"] for group in optimizer.param_groups]
    for call in (
        lambda: get_optimizer_state_dict(model, optimizer),
        lambda: set_optimizer_state_dict(
            model, optimizer, optim_state_dict={"state": {}, "param_groups": []}
        ),
        lambda: get_state_dict(model, optimizer),
    ):
        with pytest.raises(ValueError, match=r"ds_zero\.dcp_state_dict\(model, optimizer\)"):
            call()
    if stage == 3:
        with pytest.raises(ValueError, match="dcp_state_dict"):
            get_model_state_dict(model)
    assert not differing(whole(model, optimizer) if steps else whole_first(model), before)
    assert [group["lr"] for group in optimizer.param_groups] == rates
    assert all(entry.grad is None for group in optimizer.param_groups for entry in group["params"])


@ranks(2, groups_may_stay=True)
def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    model, optimizer = job(1)
    with pytest.raises(ValueError, match="was not sharded with this model"):
        ds_zero.dcp_state_dict(model, torch.optim.SGD([torch.zeros(1)]))
    nested = {"app": {"state": ds_zero.dcp_state_dict(model, optimizer)}}
    with pytest.raises(CheckpointException, match="has to be at the top level of the state dict"):
        dcp.save(nested, checkpoint_id=tmp_path / "nested")
    other = Net(1)
    sgd = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], momentum=0.9, dampening=0.1)
    ds_zero.shard(other, sgd, 1)
    with pytest.raises(CheckpointException, match="has not stepped, and its first step differs"):
        dcp.save(ds_zero.dcp_state_dict(other, sgd), checkpoint_id=tmp_path / "sgd")
    experts = nn.ModuleDict({"dense": nn.Linear(2, 2), "expert": nn.Linear(2, 2)})
    own = init_device_mesh("cpu", (2, 1), mesh_dim_names=("expert", "data"))["data"]
    adam = torch.optim.AdamW(experts.parameters(), foreach=True)
    ds_zero.shard(experts, adam, 1, mesh_for=lambda name, _: own if name.startswith("expert") else None)
    with pytest.raises(ValueError, match=r"'expert\.\w+' has different values.*ds_checkpoint\.save"):
        ds_zero.dcp_state_dict(experts, adam)
    smaller = nn.ModuleDict({"up": nn.Linear(5, 8)})
    adam = torch.optim.AdamW(smaller.parameters(), foreach=True)
    ds_zero.shard(smaller, adam, 3)
    dcp.save(ds_zero.dcp_state_dict(model), checkpoint_id=tmp_path / "model")
    with pytest.raises(CheckpointException, match="Size mismatch"):
        dcp.load(ds_zero.dcp_state_dict(smaller), checkpoint_id=tmp_path / "model")
