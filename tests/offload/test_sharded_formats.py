"""States in other formats and split masters on shards: the same bits at every stage, at every place, and after a
checkpoint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import ds_zero
from ds_core import formats
from ds_core.optim import FusedAdam
from ds_offload import CPUSGD, CPUAdagrad, CPUAdam, CPULion, HostStore, NVMeStore, PagedOptimizer
from harness import ranks
from zero.params.test_records import Memory, everyones
from zero.parity import Job, Result, assert_same, sharded

SMALL = {"reduce_bucket_numel": 700, "persistence_threshold_numel": 20}
OPTIONS: dict[str, dict[str, Any]] = {
    "int8": {"state_dtype": "int8"},
    "bf16": {"state_dtype": "bf16"},
    "split": {"split_masters": True},
    "split int8": {"state_dtype": "int8", "split_masters": True},
}
ALL = ("param", "master", "grad", "state")


def train(kind: str, stage: int, place: str, steps: int = 4) -> Result:
    store: Any = None
    if place != "memory":
        store = (
            HostStore(("master", "grad", "param")) if place == "host" else NVMeStore(tempfile.mkdtemp(), ALL)
        )

    def make(params: Iterable[nn.Parameter]) -> Optimizer:
        optimizer = CPUAdam(params, lr=1e-2, weight_decay=0.1, **OPTIONS[kind])
        return (
            PagedOptimizer(optimizer, store, page_bytes=16384, num_buffers=3)
            if place == "disk"
            else optimizer
        )

    job = Job(
        steps=steps, accumulation=2, clip=0.3, optimizer=make, model={"extras": True}, dtype=torch.bfloat16
    )
    return sharded(job, stage, store=store, accumulation="sharded", **SMALL)


@ranks(2, timeout_s=300)
@pytest.mark.parametrize("kind", OPTIONS)
def test_stages_and_places_have_the_same_bits(kind: str) -> None:
    expected = train(kind, 1, "memory")
    for stage, place in ((2, "host"), (3, "disk"), (1, "disk")):
        assert_same(train(kind, stage, place), expected)


def _model(stage: int, kind: str) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 8))
    optimizer = CPUAdam(model.parameters(), lr=1e-2, **OPTIONS.get(kind, {}))
    config = ds_zero.ZeroConfig(param_dtype=torch.bfloat16, **SMALL)
    ds_zero.shard(model, optimizer, stage, config=config)
    return model, optimizer


def _steps(model: nn.Module, optimizer: Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(step)
        loss = model(torch.randn(8, 24).bfloat16()).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@ranks(2, timeout_s=300)
@pytest.mark.parametrize("stage", [1, 3])
def test_split_masters_train_as_fp32_masters_in_memory(stage: int) -> None:
    def with_optimizer(make: Any, store: Any = None) -> Result:
        job = Job(steps=8, clip=0.3, optimizer=make, model={"extras": True}, dtype=torch.bfloat16)
        return sharded(job, stage, store=store, **SMALL)

    options = {"lr": 1e-2, "weight_decay": 0.1}
    whole = with_optimizer(lambda p: FusedAdam(p, copies_away=True, **options))
    split = with_optimizer(lambda p: CPUAdam(p, split_masters=True, **options), HostStore(("master", "grad")))
    assert_same(split, whole)


def _initial(deferred: bool, stage: int) -> nn.Module:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 8))

    if not deferred:
        return build()
    with ds_zero.deferred_init(stage=stage):
        return build()


PLACES: dict[str, Any] = {
    "device": lambda: None,
    "host": lambda: HostStore(("master", "grad", "param")),
    "states on the disk": lambda: NVMeStore(tempfile.mkdtemp(), ("state",)),
    "disk": lambda: NVMeStore(tempfile.mkdtemp(), ALL),
}


@ranks(2, timeout_s=300)
@pytest.mark.parametrize("place", PLACES)
def test_split_masters_start_from_the_weights_of_an_fp32_model(place: str) -> None:
    rank = torch.distributed.get_rank()
    for stage, deferred in ((1, False), (2, True), (3, False), (3, True)):
        expected = {name: value.clone() for name, value in _initial(False, stage).state_dict().items()}
        first = next(iter(expected.values()))
        assert not torch.equal(first.bfloat16().float(), first)
        model, store = _initial(deferred, stage), PLACES[place]()
        if rank and not deferred:  # all ranks get the values of the first one
            model.requires_grad_(False).apply(lambda m: [p.zero_() for p in m.parameters(recurse=False)])
            model.requires_grad_(True)
        optimizer: Optimizer = CPUAdam(model.parameters(), lr=1e-2, split_masters=True)
        if store is not None and "disk" in place:
            optimizer = PagedOptimizer(optimizer, store, page_bytes=16384, num_buffers=3)
        config = ds_zero.ZeroConfig(param_dtype=torch.bfloat16, **SMALL)
        ds_zero.shard(model, optimizer, stage, config=config, store=store)
        for name, value in expected.items():
            found = ds_zero.get_full(model, name)
            assert found is not None and torch.equal(found, value), f"{place}, stage {stage}: {name}"
            with ds_zero.gathered([model.get_parameter(name)]):
                assert torch.equal(model.get_parameter(name), formats.round_away(value))
        values = {(r.fqn, r.flat_offset): r for r in ds_zero.records(model, optimizer) if r.state == "param"}
        for (name, offset), record in values.items():
            data = record.data if isinstance(record.data, Tensor) else record.data.load()
            assert torch.equal(data, expected[name].reshape(-1)[offset : offset + data.numel()])
        ds_zero.destroy(model)


@ranks(2, timeout_s=300)
@pytest.mark.parametrize("make", [CPULion, CPUAdagrad, CPUSGD])
def test_the_first_step_of_split_masters_is_that_of_fp32_masters(make: Any) -> None:
    more = {"momentum": 0.9, "dampening": 0.5} if make is CPUSGD else {}

    def with_optimizer(place: str, **options: Any) -> Result:
        store = PLACES[place]()

        def optimizer(params: Iterable[nn.Parameter]) -> Optimizer:
            inner = make(params, lr=1e-3, weight_decay=0.1, **options, **more)
            if place == "host":
                return inner
            return PagedOptimizer(inner, store, page_bytes=16384, num_buffers=3)

        job = Job(steps=1, optimizer=optimizer, model={"extras": True}, dtype=torch.bfloat16)
        return sharded(job, 2, store=store, **SMALL)

    whole = with_optimizer("host").weights
    for place in ("host", "disk"):
        split = with_optimizer(place, split_masters=True).weights
        for name, value in whole.items():
            assert torch.equal(split[name], value), f"{place}: {name}"


@ranks(2)
def test_what_is_written_to_gathered_parameters_is_the_master() -> None:
    model, _ = _model(3, "split")
    before = ds_zero.get_full(model, "0.weight")
    with torch.no_grad(), ds_zero.gathered(list(model.parameters()), write=True):
        model.get_parameter("0.weight")[:3] = 0.7
    after = ds_zero.get_full(model, "0.weight")
    assert before is not None and after is not None
    assert torch.equal(after[3:], before[3:]) and (after[:3] == torch.tensor(0.7).bfloat16().float()).all()


@ranks(2)
def test_values_loaded_without_states_replace_all_bits_of_a_master() -> None:
    model, optimizer = _model(1, "split")
    _steps(model, optimizer, range(2))
    saved = _Saved(ds_zero.records(model, optimizer))
    names = [name for name, _ in model.named_parameters()]
    values = {name: ds_zero.get_full(model, name) for name in names}
    other, fresh = _model(3, "split")
    ds_zero.load_records(other, fresh, saved, optimizer_states=False)
    for name in names:
        found, expected = ds_zero.get_full(other, name), values[name]
        assert found is not None and expected is not None and torch.equal(found, expected)


class _Saved(Memory):
    """All ranks' records, with values that were loaded."""

    def __init__(self, own: list[ds_zero.ShardRecord]) -> None:
        loaded = [
            replace(r, data=r.data if isinstance(r.data, Tensor) else r.data.load().clone()) for r in own
        ]
        super().__init__(everyones(loaded))


@ranks(2, timeout_s=300)
@pytest.mark.parametrize("kind", OPTIONS)
def test_a_checkpoint_continues_bit_for_bit_at_another_stage(kind: str) -> None:
    model, optimizer = _model(1, kind)
    _steps(model, optimizer, range(3))
    saved = _Saved(ds_zero.records(model, optimizer))
    assert {t.dtype for (_, state, _), t in saved.tensors.items() if state == "param"} == {torch.float32}
    assert not any(state == "master_bits" for _, state, _ in saved.tensors)
    expected = _steps(model, optimizer, range(3, 6))
    weights = ds_zero.full_state_dict(model)
    other, resumed = _model(3, kind)
    ds_zero.load_records(other, resumed, saved)
    assert _steps(other, resumed, range(3, 6)) == expected
    found = ds_zero.full_state_dict(other)
    assert all(torch.equal(found[n], weights[n]) for n in weights)
    again = _Saved(ds_zero.records(other, resumed))
    assert set(again.tensors) == set(saved.tensors)


@ranks(1)
def test_states_of_another_format_are_refused_by_name() -> None:
    model, optimizer = _model(1, "int8")
    _steps(model, optimizer, range(1))
    saved = _Saved(ds_zero.records(model, optimizer))
    other, wide = _model(1, "fp32")
    with pytest.raises(
        ValueError, match=r"'exp_avg' was saved as torch\.uint8, but this optimizer keeps it as torch\.f"
    ):
        ds_zero.load_records(other, wide, saved)


@ranks(1)
@pytest.mark.parametrize("kind", OPTIONS)
def test_a_flipped_bit_of_a_state_is_found(kind: str) -> None:
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 8))
    optimizer = CPUAdam(model.parameters(), lr=1e-2, **OPTIONS[kind])
    config = ds_zero.ZeroConfig(param_dtype=torch.bfloat16, checksums=True)
    ds_zero.shard(model, optimizer, 1, config=config, store=HostStore(("master", "grad")))
    _steps(model, optimizer, range(2))
    name = "master_bits" if "split" in kind else "exp_avg"
    state = optimizer.state[optimizer.param_groups[0]["params"][0]][name]
    state.reshape(-1).view(torch.uint8).numpy()[3] ^= 4  # past torch's counter of versions
    with pytest.raises(ds_zero.ChecksumError, match=f"{name} of '0.weight'"):
        _steps(model, optimizer, range(2, 3))


@pytest.mark.parametrize(
    ("options", "bytes_of_each"),
    [
        ({}, 16),
        ({"state_dtype": "bf16"}, 12),
        (OPTIONS["int8"], 10),
        (OPTIONS["split"], 16),
        (OPTIONS["split int8"], 10),
    ],
)
def test_a_plan_counts_the_bytes_of_a_format(options: dict[str, Any], bytes_of_each: int) -> None:
    made = nn.Linear(256, 1024, bias=False)
    plan = ds_zero.plan(
        made,
        optimizer=lambda params: CPUAdam(params, **options),
        stage=2,
        ranks=2,
        config=ds_zero.ZeroConfig(param_dtype=torch.bfloat16),
        offload=("master", "grad", "state"),
    )
    assert plan.host_bytes == bytes_of_each * made.weight.numel() // 2


@ranks(2)
@pytest.mark.parametrize("stage", [1, 3])
def test_split_masters_are_read_and_written_whole(stage: int) -> None:
    model, optimizer = _model(stage, "split")
    _steps(model, optimizer, range(2))
    saved = ds_zero.records(model, optimizer)
    for name in ("0.weight", "2.bias"):
        master = ds_zero.get_full(model, name)
        assert master is not None and not torch.equal(master.bfloat16().float(), master)
        ranges = [r for r in saved if r.fqn == name and r.state == "param"]
        for r in ranges:
            data = r.data if isinstance(r.data, Tensor) else r.data.load()
            assert torch.equal(data, master.reshape(-1)[r.flat_offset : r.flat_offset + data.numel()])
        local, (start, count) = ds_zero.get_local(model, name), ds_zero.local_range(model, name)
        assert local is not None and torch.equal(local, master.reshape(-1)[start : start + count])
        wanted = torch.linspace(-1, 1, master.numel()).view(master.shape)
        ds_zero.set_full(model, name, "param", wanted)
        back = ds_zero.get_full(model, name)
        assert back is not None and torch.equal(back, wanted)
    ds_zero.destroy(model)
