"""State on a disk by the configuration."""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ds_core
import ds_engine
import ds_offload
import ds_zero
from ds_engine.build import offload
from ds_engine.build import zero as zero_section
from ds_engine.build.memory.predict import predicted
from ds_engine.build.optimizer import optimizer_of
from ds_engine.build.topology import Meshes, arranged
from ds_engine.config import ConfigError, load
from ds_engine.job import Job, choices_of, describe
from ds_offload.interfaces import PageKey, PageReservation
from harness import ranks


def job(zero: dict[str, Any], **more: Any) -> Job:
    config = load({"train_batch_size": 8, "zero_optimization": zero, **more})
    return describe(choices_of(config), arranged(config, 0, 1), "cpu")


def test_the_settings_reach_the_store(tmp_path: Path) -> None:
    states, params = tmp_path / "states", tmp_path / "params"
    for folder in (states, params):
        folder.mkdir()
    zero = {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": str(states), "buffer_count": 5},
        "offload_param": {"device": "nvme", "nvme_path": str(params)},
    }
    aio = {"block_size": 65536, "queue_depth": 3, "intra_op_parallelism": 2, "verify": "sampled"}
    made = job(zero, aio=aio)
    store = offload.store_of(made)
    assert isinstance(store, ds_offload.NVMeStore)
    assert store.folders == {"grad": states, "master": states, "param": params, "state": states}
    assert store.options == ds_offload.NVMeOptions(
        block_bytes=65536, queue_depth=3, num_threads=2, verify="sampled"
    )
    optimizer = ds_offload.CPUAdam(nn.Linear(2, 2).parameters())
    paged = offload.paged(made, optimizer, store)
    assert isinstance(paged, ds_offload.PagedOptimizer) and paged.inner is optimizer
    assert paged.num_buffers == 5
    assert offload.paged(made, paged, store) is paged
    mixed = job({**zero, "offload_param": {"device": "cpu"}})
    assert offload.store_of(mixed).folders.keys() == {"grad", "master", "state"}
    host = job({**zero, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}})
    assert offload.store_of(host).kinds == {"grad", "master", "state", "param"}
    assert offload.paged(host, optimizer, None) is optimizer
    assert offload.store_of(job({"stage": 3})) is None
    with pytest.raises(ConfigError, match="needs a buffer_count of at least 3"):
        job({"stage": 1, "offload_optimizer": {"device": "nvme", "nvme_path": "/x", "buffer_count": 2}})


@pytest.mark.parametrize("pin", [True, False])
def test_pin_memory_reaches_the_stores(pin: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every allocation in host memory asks for it, of both stores, with the type of the device."""
    asked: list[tuple[bool, str]] = []
    choose = ds_core.pinned.choose

    def watched(wanted: bool, device_type: str) -> ds_core.pinned.Pinning:
        asked.append((wanted, device_type))
        return choose(wanted, device_type)

    monkeypatch.setattr(ds_core.pinned, "choose", watched)
    item = PageReservation(key=PageKey(name="a", owner=1), numel=8, device=torch.device("cpu"))
    on_disk = {"device": "nvme", "nvme_path": str(tmp_path), "pin_memory": pin}
    for zero in (
        {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": pin}},
        {"stage": 3, "offload_optimizer": on_disk, "offload_param": {"device": "cpu", "pin_memory": not pin}},
        {"stage": 3, "offload_param": on_disk},
    ):
        asked.clear()
        store = offload.store_of(job(zero))
        store.reserve([item])
        if "nvme_path" in str(zero):
            store.staging(8, torch.uint8, torch.device("cpu"))
        assert set(asked) <= {(pin, "cpu")} and (asked or "offload_param" in zero)


def test_fractions_reach_store_plan_and_buckets(tmp_path: Path) -> None:
    on_disk = {"device": "nvme", "nvme_path": str(tmp_path)}
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(40)))
    numel = 40 * 64 * 64
    plans, stored = {}, {}
    for name, zero in {
        "all": {"offload_optimizer": on_disk, "offload_param": on_disk},
        "half": {
            "offload_optimizer": {**on_disk, "ratio": 0.5},
            "offload_param": {**on_disk, "max_in_cpu": numel / 4},
        },
    }.items():
        section = {"stage": 3, "stage3_param_persistence_threshold": 0, **zero}
        made = job(section, bf16={"enabled": True}, optimizer={"type": "AdamW"})
        plans[name] = predicted(made, model)
        store = offload.store_of(made)
        sharded = copy.deepcopy(model)
        optimizer = offload.paged(made, ds_offload.CPUAdam(sharded.parameters()), store)
        zero_section.shard(made, sharded, optimizer, Meshes(), torch.device("cpu"), store=store)
        sharded(torch.ones(1, 64, dtype=torch.bfloat16)).float().sum().backward()
        optimizer.step()
        stored[name] = store.num_bytes
        ds_zero.destroy(sharded)
    assert plans["all"].disk_bytes == stored["all"] == 18 * numel
    assert plans["half"].disk_bytes == stored["half"] == 16 * numel / 2 + 2 * numel * 3 / 4
    placement = job({"stage": 1, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}).placement
    assert (placement.ratio, placement.params_in_cpu) == (0.5, 0)
    divided = job({"stage": 1, "offload_optimizer": {"device": "cpu", "ratio": 0.5}})
    assert zero_section.zero_config(divided, model).reduce_bucket_numel == numel // 32
    assert job({"stage": 1, "offload_optimizer": {"ratio": 0.5}}).placement.ratio == 1.0


def train(zero: dict[str, Any], folder: Path, **more: Any) -> list[float]:
    """Trains 3 steps, saves, 2 more, loads, and 2 again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 300), nn.Tanh(), nn.Linear(300, 7), nn.Linear(7, 1))
    config = {
        "train_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": zero,
        "startup_summary": False,
        **more,
    }
    engine, *_ = ds_engine.initialize(model, config)
    losses = []

    def steps(numbers: range) -> None:
        for number in numbers:
            for micro in range(2):
                torch.manual_seed(10 * number + micro)
                data = torch.randn(4, 64, dtype=next(model.parameters()).dtype)
                loss = engine(data).float().square().mean()
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())

    with engine:
        steps(range(3))
        engine.save_checkpoint(folder)
        steps(range(3, 5))
        engine.load_checkpoint(folder)
        steps(range(3, 5))
    assert losses[-4:] == losses[-8:-4]
    return losses


@ranks(2)
@pytest.mark.parametrize("stage", [1, 3])
def test_training_and_checkpoints_have_the_same_bits_on_the_disk(stage: int, tmp_path: Path) -> None:
    more = {"bf16": {"enabled": True}} if stage == 3 else {}
    on_disk = {"device": "nvme", "nvme_path": str(tmp_path)}
    expected = train({"stage": stage, "offload_optimizer": {"device": "cpu"}}, tmp_path / "a", **more)
    section = {"offload_optimizer": on_disk, **({"offload_param": on_disk} if stage == 3 else {})}
    assert train({"stage": stage, **section}, tmp_path / "b", **more) == expected
    part = {
        "offload_optimizer": {**on_disk, "ratio": 0.5},
        "offload_param": {**on_disk, "max_in_cpu": 10_000},
    }
    part = part if stage == 3 else {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}
    assert train({"stage": stage, **part}, tmp_path / "c", **more) == expected
    # A checkpoint does not depend on where the states were.
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c"}, "swap files have no names"
    model = nn.Sequential(nn.Linear(64, 300), nn.Tanh(), nn.Linear(300, 7), nn.Linear(7, 1))
    engine, *_ = ds_engine.initialize(
        model,
        {
            "train_batch_size": 16,
            "optimizer": {"type": "AdamW"},
            "zero_optimization": {"stage": 0},
            "startup_summary": False,
        },
    )
    with engine:
        engine.load_checkpoint(tmp_path / "b")
        assert engine.global_steps == 3


@pytest.mark.parametrize(("share", "count"), [(0.0, 1), (0.5, None), (1.0, None)])
def test_a_share_of_the_cores_is_left_to_the_optimizer(share: float, count: int | None) -> None:
    own = sorted(os.sched_getaffinity(0))
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu", "cpuadam_cores_perc": share}}
    config = load({"train_batch_size": 8, "zero_optimization": zero, "optimizer": {"type": "AdamW"}})
    made = optimizer_of(choices_of(config), None, nn.Linear(2, 2))
    assert isinstance(made, ds_offload.CPUAdam)
    assert made.cores == own[-(count or math.ceil(share * len(own))) :]
