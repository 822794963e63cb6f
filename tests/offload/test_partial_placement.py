"""A fraction of the state on the device, the rest in host memory or on a disk."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ds_zero
from ds_core import arena
from ds_offload import CPUAdam, HostStore, NVMeStore, PagedOptimizer, TiersByKind
from ds_zero.interfaces import Reservation, ShardKey
from ds_zero.predict.measured_memory import counted_memory
from zero.planned import Gpt

ALL = ("param", "master", "grad", "state")
STEPPED = ("master", "grad", "state")
CPU = torch.device("cpu")


def items(sizes: dict[str, int]) -> list[Reservation]:
    return [
        Reservation(
            key=ShardKey(name=name, kind=kind), partition=kind, numel=numel, dtype=torch.float32, device=CPU
        )
        for kind in ALL
        for name, numel in sizes.items()
    ]


def chosen(tiers: TiersByKind, sizes: dict[str, int]) -> dict[tuple[str, str], str]:
    plan = items(sizes)
    return {(i.key.name, i.key.kind): t for i, t in zip(plan, tiers(plan), strict=True)}


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.5, 0.77, 1.0])
def test_whole_buckets_are_on_the_device_and_never_more_than_asked(ratio: float) -> None:
    sizes = {f"b{i}": 100 + 37 * i for i in range(20)}
    total = sum(sizes.values())
    tiers = chosen(TiersByKind(host=STEPPED, ratio=ratio), sizes)
    on_device = [name for name in sizes if tiers[name, "master"] == "device"]
    for name in sizes:
        assert {tiers[name, kind] for kind in STEPPED} == {"device" if name in on_device else "host"}
        assert tiers[name, "param"] == "device"
    numel = sum(sizes[name] for name in on_device)
    assert numel <= (1 - ratio) * total + 1e-6
    assert numel > (1 - ratio) * total - max(sizes.values()), "another bucket would have fit"


def test_some_parameters_stay_in_host_memory() -> None:
    sizes = {"a": 500, "b": 400, "c": 300}
    tiers = chosen(TiersByKind(disk=ALL, max_in_cpu=800), sizes)
    assert [tiers[name, "param"] for name in sizes] == ["host", "disk", "host"]  # 500 and 300
    assert {tiers[name, kind] for name in sizes for kind in STEPPED} == {"disk"}
    assert "host" not in chosen(TiersByKind(disk=ALL), sizes).values()
    assert chosen(TiersByKind(host=ALL, max_in_cpu=1), sizes)["a", "param"] == "host"


@pytest.mark.parametrize("wrong", [{"ratio": 1.1}, {"ratio": -0.1}, {"max_in_cpu": -1}])
def test_impossible_fractions_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))}={next(iter(wrong.values()))}: it is a"):
        TiersByKind(**wrong)


def nets() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(10)))


def test_the_bytes_are_where_they_should_be() -> None:
    """The arena holds what is on the host; torch's allocator holds what is on the device."""
    gc.collect()
    before = arena.stats().in_use_bytes
    model = nets()
    numel = 256 * 256
    store = HostStore(tiers=TiersByKind(host=STEPPED, ratio=0.3))
    optimizer = CPUAdam(model.parameters())
    optimizer.keep_states_in(store)
    config = ds_zero.ZeroConfig(param_dtype=torch.bfloat16, persistence_threshold_numel=0)
    ds_zero.shard(model, optimizer, 3, config=config, store=store)
    assert arena.stats().in_use_bytes - before == 3 * numel * 8  # masters and gradients of three layers
    with counted_memory() as counted:
        model(torch.ones(2, 256, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert arena.stats().in_use_bytes - before == 3 * numel * 16  # and their states
    held = [state["exp_avg"] for state in optimizer.state.values()]
    assert sum(store.state_tier(p) == "device" for p in optimizer.state) == 7
    assert counted.peak_bytes >= 7 * numel * 8, "the states of seven layers are torch's"
    assert len(held) == 10
    ds_zero.destroy(model)


def test_a_store_without_a_disk_refuses_tensors_for_one() -> None:
    store = HostStore(tiers=TiersByKind(disk=("master",)))
    with pytest.raises(ValueError, match=r"the master of 'a' belongs on a disk: use an NVMeStore"):
        store.reserve(items({"a": 10}))


def test_a_disk_without_a_folder_for_a_kind_is_refused(tmp_path: Path) -> None:
    store = NVMeStore({"master": tmp_path}, tiers=TiersByKind(disk=("grad", "master")))
    with pytest.raises(ValueError, match=r"no folder for kind 'grad': there are folders for master"):
        store.reserve(items({"a": 10}))


CASES: dict[str, tuple[int, TiersByKind]] = {
    "half on the host": (2, TiersByKind(host=STEPPED, ratio=0.5)),
    "a third on the disk": (3, TiersByKind(disk=STEPPED, ratio=0.35)),
    "some parameters in host memory": (3, TiersByKind(disk=ALL, max_in_cpu=1_500_000)),
    "all of it": (3, TiersByKind(host=("param",), disk=STEPPED, ratio=0.5)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_plan_knows_the_bytes_of_every_tier(case: str, tmp_path: Path) -> None:
    stage, tiers = CASES[case]
    model: dict[str, Any] = {"layers": 6, "dim": 256}
    config = ds_zero.ZeroConfig(param_dtype=torch.bfloat16, reduce_bucket_numel=1 << 18)
    inputs = torch.zeros(2, 16, dtype=torch.long)
    plan = ds_zero.plan(
        lambda: Gpt(**model),
        (inputs, inputs),
        stage=stage,
        optimizer=CPUAdam,
        config=config,
        tiers=tiers,
        device="cpu",
    )
    store: Any = HostStore(tiers=tiers) if not tiers.disk else NVMeStore(tmp_path, tiers.disk, tiers=tiers)
    gc.collect()
    start = arena.stats().in_use_bytes
    host = 0
    with counted_memory(lambda: arena.stats().in_use_bytes) as counted:
        with ds_zero.deferred_init(stage=stage):
            net = Gpt(**model)
        adam = CPUAdam(net.parameters())
        adam.keep_states_in(store)
        optimizer = PagedOptimizer(adam, store) if tiers.disk else adam
        ds_zero.shard(net, optimizer, stage, config=config, store=store)
        for _ in range(3):
            counted.mark("forward")
            loss = net(inputs, inputs)
            counted.mark("backward")
            loss.backward()
            counted.mark("step")
            ds_zero.clip_grad_norm_(net, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            counted.mark("between")
        host = arena.stats().in_use_bytes - start
    report = f"planned {plan.device_bytes}, counted {counted.phase_bytes}, host {host}\n{plan}"
    assert counted.peak_bytes * 0.95 <= plan.device_bytes <= 1.05 * counted.peak_bytes, report
    assert host * 0.95 <= plan.host_bytes <= 1.05 * host, report
    if tiers.disk:
        assert plan.disk_bytes == pytest.approx(store.num_bytes, rel=0.05), report
    ds_zero.destroy(net)
