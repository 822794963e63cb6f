"""Training does not depend on where state is stored: device, host, disk or several of them."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_zero
from ds_core.optim import FusedAdam
from ds_offload import CPUAdam, HostStore, NVMeStore, PagedOptimizer, TiersByKind
from ds_zero.runtime.early_step import CLIPPED, NOT_FINITE
from harness import ranks
from harness.covering import covering
from zero.parity import Job, Result, assert_same, sharded

ALL = ("param", "master", "grad", "state")
DISK = {
    "host": (),
    "part of host": (),
    "disk": ALL,
    "part of disk": ALL,
    "states on the disk": ("state",),
    "mixed": ("master", "state"),
}
FACTORS = {
    "stage": [1, 2, 3],
    "place": ["host", "part of host", "disk", "part of disk", "states on the disk", "mixed"],
    "overlap": [True, False],
    "early": [True, False],
    "accumulation": [1, 4],
    "clip": [None, 0.3, 1e9],
    "precision": ["fp16", "bf16", "fp32"],
}
ROWS = covering(FACTORS)
SMALL = {"reduce_bucket_numel": 700, "persistence_threshold_numel": 20}
PRECISIONS: dict[str, dict[str, Any]] = {
    # The first steps overflow at this scale.
    "fp16": {
        "dtype": torch.float16,
        "scale": ds_zero.DynamicScale(initial_scale=2.0**20, hysteresis=1, window=8),
    },
    "bf16": {"dtype": torch.bfloat16},
    "fp32": {"dtype": torch.float32},
}


def train(row: dict[str, Any], place: str, steps: int) -> Result:
    """Trains on 2 ranks, with the state at `place`; "memory": on the device."""
    on_disk = DISK.get(place, ())
    folder = tempfile.mkdtemp()
    store: Any = None
    if place == "host":
        store = HostStore(("master", "grad", "param"))
    elif place == "part of host":
        store = HostStore(tiers=TiersByKind(host=("master", "grad", "state", "param"), ratio=0.6))
    elif place == "part of disk":
        tiers = TiersByKind(disk=ALL, ratio=0.6, max_in_cpu=700)
        store = NVMeStore(folder, on_disk, tiers=tiers)
    elif place != "memory":
        store = NVMeStore(folder, on_disk)

    def make(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        options = {"lr": 1e-2, "weight_decay": 0.1}
        if place == "memory":
            return FusedAdam(params, **options)
        optimizer = CPUAdam(params, **options)
        optimizer.keep_states_in(store)
        if "state" not in on_disk:
            return optimizer
        overlap = row["overlap"]
        return PagedOptimizer(
            optimizer, store, page_bytes=16384, num_buffers=3, overlap_reads=overlap, overlap_writes=overlap
        )

    job = Job(
        steps=steps,
        accumulation=row["accumulation"],
        clip=row["clip"],
        optimizer=make,
        model={"extras": True},
        **PRECISIONS[row["precision"]],
    )
    overlaps = place != "memory" and row["early"]
    early = {"overlap_step": overlaps, "accumulation_steps": row["accumulation"]}
    return sharded(job, row["stage"], store=store, **early, **SMALL)


@functools.cache
def in_memory(
    num_ranks: int, stage: int, precision: str, accumulation: int, clip: float | None, steps: int
) -> Result:
    """The result that all places must have; the ranks of later tests have it still."""
    row = {"stage": stage, "precision": precision, "accumulation": accumulation, "clip": clip}
    return train(row, "memory", steps)


def check(row: dict[str, Any], steps: int) -> None:
    found = train(row, row["place"], steps)
    job = (row[name] for name in ("stage", "precision", "accumulation", "clip"))
    assert_same(found, in_memory(dist.get_world_size(), *job, steps))
    overlap = found.overlap
    assert overlap is not None
    if not row["early"] or row["precision"] == "fp32":
        assert overlap.kept == overlap.taken_back == 0
    elif row["clip"] == 0.3:
        assert overlap.reasons[CLIPPED] > 0
    elif row["precision"] == "fp16":
        assert overlap.kept > 0 and overlap.reasons[NOT_FINITE] > 0
    else:
        assert overlap.kept == overlap.steps == steps and overlap.buckets > 0


@ranks(2, timeout_s=300)
def test_training_has_the_bits_of_training_in_memory() -> None:
    for row in ROWS:
        check(row, 6)


@pytest.mark.full
@ranks(1, 2, timeout_s=900)
@pytest.mark.parametrize("place", FACTORS["place"])
@pytest.mark.parametrize("precision", FACTORS["precision"])
@pytest.mark.parametrize("stage", FACTORS["stage"])
def test_everything(stage: int, place: str, precision: str) -> None:
    pages = "state" in DISK[place]
    for overlap, early, accumulation, clip in itertools.product(
        [True, False] if pages else [True],  # of reading and writing pages, where there are any
        *(FACTORS[name] for name in ("early", "accumulation", "clip")),
    ):
        row = {"overlap": overlap, "early": early, "accumulation": accumulation, "clip": clip}
        check({"stage": stage, "place": place, "precision": precision, **row}, 30)
