"""`offload.budget`: state is placed within amounts of memory, as predicted."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ds_zero
from ds_core import arena
from ds_core.host_limits import Limit, NotEnoughMemory
from ds_engine.build import memory, offload
from ds_engine.build import zero as zero_section
from ds_engine.build.memory.predict import predicted
from ds_engine.build.optimizer import optimizer_of
from ds_engine.build.topology import Meshes, arranged
from ds_engine.config import ConfigError, load
from ds_engine.job import Job, choices_of, describe
from engine.build.test_offload import train
from harness import ranks

LAYERS, WIDTH = 48, 256
NUMEL = LAYERS * WIDTH * WIDTH
MIB = 2**20


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def job(budget: dict[str, Any], *, overlap: bool = False, **more: Any) -> Job:
    section: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    if overlap:
        section["offload_optimizer"] = {"overlap_step": True}
    config = load(
        {
            "train_batch_size": 8,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW"},
            "zero_optimization": section,
            "offload": {"budget": budget},
            **more,
        }
    )
    return describe(choices_of(config), arranged(config, 0, 1), "cpu")


@pytest.mark.parametrize("overlap", [False, True])
def test_every_tier_has_the_bytes_of_the_plan(overlap: bool, tmp_path: Path) -> None:
    """Device memory is counted as torch's, host memory as the arena's, the disk as its files."""
    budget = (36 if overlap else 24) * MIB
    made = job({"device": "12MiB", "host": budget, "nvme_path": str(tmp_path)}, overlap=overlap)
    model = net()
    plan, placed = predicted(made, model), memory.placed(made, model)
    total = 18 * NUMEL
    on_device, on_host, on_disk = (
        placed.num_bytes(tier) + placed.undo_bytes[tier] for tier in ("device", "host", "disk")
    )
    assert on_device <= 12 * MIB and on_host + placed.buffer_bytes <= budget
    assert on_device > 0.8 * 12 * MIB and placed.num_bytes("host") > 0
    assert sum(placed.undo_bytes.values()) == (14 * NUMEL if overlap else 0)
    assert sum(placed.num_bytes(tier) for tier in ("device", "host", "disk")) == total
    store = offload.store_of(made, placed)
    gc.collect()
    before = arena.stats().in_use_bytes
    sharded = copy.deepcopy(model)
    optimizer = offload.paged(made, optimizer_of(made, None, sharded), store, placed)
    zero_section.shard(made, sharded, optimizer, Meshes(), torch.device("cpu"), store=store)
    for _ in range(2):
        sharded(torch.ones(1, WIDTH, dtype=torch.bfloat16)).float().sum().backward()
        ds_zero.clip_grad_norm_(sharded, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    host = arena.stats().in_use_bytes - before
    if overlap:
        assert ds_zero.step_overlap(sharded).buckets == LAYERS
        host += 2 * NUMEL  # new parameters beside the old ones, which are not in the arena
    assert store.num_bytes == pytest.approx(on_disk, rel=0.05)
    assert plan.disk_bytes == on_disk
    assert plan.host_bytes == pytest.approx(host, rel=0.05)
    assert host <= budget * 1.05
    if overlap:
        ds_zero.destroy(sharded)
        return
    report = ds_zero.memory(sharded, optimizer)
    assert report.total_bytes - host == pytest.approx(placed.num_bytes("device"), rel=0.05)
    assert plan.fits is None, "activations come on top of the budget"
    assert "placement within offload.budget" in str(plan) and "optimizer states" in str(plan)
    ds_zero.destroy(sharded)


def test_everything_stays_on_the_device_if_it_fits() -> None:
    made = job({"device": "1GB", "host": "1GB"})
    placed = memory.placed(made, net())
    assert placed.num_bytes("device") == 18 * NUMEL
    assert offload.store_of(made, placed) is None


def test_without_a_disk_a_small_budget_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        ConfigError, match=r"offload.budget: the state of a rank takes 54.0 MiB .*device 1.9 MiB, host"
    ):
        memory.placed(job({"device": "2MB", "host": "3MB"}), net())


def test_rates_change_the_placement(tmp_path: Path) -> None:
    budget = {"device": 0, "host": "40MiB", "nvme_path": str(tmp_path)}
    steps = [
        memory.placed(job(budget, offload={"budget": budget, "rates": {"disk_read": rate}}), net()).step_s
        for rate in ("1GB", "4GB")
    ]
    assert steps[0] > 1.5 * steps[1]


def test_rates_that_were_not_measured_are_named(tmp_path: Path) -> None:
    budget = {"device": 0, "host": "40MiB", "nvme_path": str(tmp_path)}
    rates = {"disk_read": "1GB", "host": "9GB"}
    activations = {"device": "nvme", "nvme_path": str(tmp_path), "max_host_bytes": 4 << 20}
    made = job(budget, offload={"budget": budget, "rates": rates}, activation_offload=activations)
    placed = memory.placed(made, net())
    assert placed.reserve_bytes == 4 << 20 and "activations" in str(placed)
    [note] = offload.budget_notes(made, placed)
    assert "not measured: disk_write 2 GB/s are assumed" in note and "ds plan --measure-offload" in note
    assert note in predicted(made, net()).notes
    unlimited = job(budget, activation_offload={"device": "cpu"})
    assert (
        "activation_offload.max_host_bytes"
        in offload.budget_notes(unlimited, memory.placed(unlimited, net()))[1]
    )


@ranks(2)
def test_training_within_a_budget_has_the_same_bits(tmp_path: Path) -> None:
    more = {"bf16": {"enabled": True}}
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    expected = train({**zero, "offload_optimizer": {"device": "cpu"}}, tmp_path / "a", **more)
    budget = {"device": "50kB", "host": "300kB", "nvme_path": str(tmp_path)}
    assert train(zero, tmp_path / "b", offload={"budget": budget}, **more) == expected


def limit(name: str, available: int) -> Limit:
    return Limit(name=name, available_bytes=available, shared=True, remedy="raise it")


class _World:
    rank, world_size, local_rank, local_size = 1, 4, 1, 4
    device, backend, source = torch.device("cpu"), "gloo", "test"


def test_a_host_without_room_for_all_ranks_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    config = load({"train_batch_size": 8, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
                   "optimizer": {"type": "AdamW"}, "bf16": {"enabled": True}})  # fmt: skip
    made = describe(choices_of(config), arranged(config, 0, 1), "cpu")
    model = net()
    optimizer = optimizer_of(made, None, model)
    reserved = arena.stats().reserved_bytes

    def check(available: int, made: Job = made, free: int = 1 << 40) -> None:
        memory.refuse_if_impossible(
            made,
            model,
            optimizer,
            _World(),
            memory_limits=lambda: [
                Limit(name="memory.max", available_bytes=available, shared=True, remedy="raise it")
            ],
            folder_limit=lambda path: Limit(
                name=f"space of {path}", available_bytes=free, shared=True, remedy="free it"
            ),
        )

    check(1 << 40)
    with pytest.raises(NotEnoughMemory) as caught:
        check(100 * MIB)
    said = str(caught.value)
    assert (
        "rank 1 needs" in said
        and "for the 4 ranks of this machine" in said
        and "memory.max permits only" in said
    )
    assert "100 MiB" in said and "Raise it; or keep state on a disk" in said
    on_disk = {"device": "nvme", "nvme_path": str(tmp_path)}
    config = load({"train_batch_size": 8, "zero_optimization": {"stage": 2, "offload_optimizer": on_disk},
                   "optimizer": {"type": "AdamW"}, "bf16": {"enabled": True}})  # fmt: skip
    stored = describe(choices_of(config), arranged(config, 0, 1), "cpu")
    check(1 << 40, stored)
    with pytest.raises(
        NotEnoughMemory, match=rf"state on the disk at {tmp_path}, but space of .* permits only 150 MiB"
    ):
        check(1 << 40, stored, free=150 * MIB)
    assert arena.stats().reserved_bytes == reserved


REFUSED_BY_THE_PROCESS = """
import resource, torch
import ds_engine
from torch import nn
from ds_core import arena, host_limits
def used():
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1])
model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(20)))  # 80 MB
config = {"train_batch_size": 1, "bf16": {"enabled": True}, "optimizer": {"type": "AdamW"},
          "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
arena.empty(1 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (used() + (200 << 20),) * 2)
before = arena.stats().in_use_bytes
try:
    ds_engine.initialize(model, config)
    raise SystemExit("not refused")
except host_limits.NotEnoughMemory as error:
    said = str(error)
assert "rank 0 needs" in said and "training state in host memory" in said and "RLIMIT_DATA (ulimit -d)" in said, said
assert arena.stats().in_use_bytes == before
"""


def test_a_real_limit_of_the_process_refuses_in_initialize() -> None:
    subprocess.run([sys.executable, "-c", REFUSED_BY_THE_PROCESS], check=True, timeout=300)
