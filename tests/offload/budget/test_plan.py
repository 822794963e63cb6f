"""The planner of placements: beside brute force, and its refusals."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from ds_offload.budget.costs import Option, options
from ds_offload.budget.inputs import KINDS, BucketBytes, Rates, Room, Seconds, Work
from ds_offload.budget.linear import minimize
from ds_offload.budget.plan import BudgetError, buffer_bytes, disk_kinds, place
from ds_zero.interfaces import Reservation, ShardKey

MIB = 2**20


def bucket(name: str, numel: int, *, param: bool = True, undo: bool = False) -> BucketBytes:
    kinds = {"master": 4 * numel, "grad": 4 * numel, "state": 8 * numel}
    return BucketBytes(
        name=name,
        kinds={**({"param": 2 * numel} if param else {}), **kinds},
        copy_bytes=2 * numel,
        undo={"param": 2 * numel, "master": 4 * numel, "state": 8 * numel} if undo else {},
    )


def fastest(of_each: Sequence[Sequence[Option]], room: Room, compute_s: float) -> float:
    """The time of the best of all combinations; infinite if none fits."""
    sums = np.zeros((1, 9))
    for of_one in of_each:
        vectors = np.array([option.vector() for option in of_one])
        sums = (sums[:, None, :] + vectors[None, :, :]).reshape(-1, 9)
        # Combinations that do not fit already, never will.
        for i, limit in enumerate((room.device_bytes, room.host_bytes, room.disk_bytes)):
            if limit is not None:
                sums = sums[sums[:, i] <= limit]
    if not len(sums):
        return float("inf")
    loading = np.maximum(np.maximum(sums[:, 3], sums[:, 4]) - compute_s, 0)
    return float((loading + sums[:, 5:8].max(axis=1) + sums[:, 8]).min())


def case(seed: int) -> tuple[list[BucketBytes], Room, Rates, Work]:
    """Buckets of different sizes, some without parameters, and limits that hold a random part of them."""
    rng = random.Random(seed)
    count = rng.choice([2, 3, 4])
    buckets = [bucket(f"b{i}", rng.randrange(1, 40) * MIB, param=rng.random() < 0.7) for i in range(count)]
    total = sum(sum(b.kinds.values()) for b in buckets)
    disk = rng.choice([0, None, None, total])
    device = int(total * rng.uniform(0.05, 0.6))
    host = int(total * (1.1 if disk == 0 else rng.uniform(0.2, 0.7)))
    if disk != 0:
        host += buffer_bytes(buckets, KINDS)
    rates = Rates(
        host=rng.uniform(1e10, 1e11),
        link=rng.uniform(5e9, 5e10),
        disk_read=rng.uniform(1e9, 7e9),
        disk_write=rng.uniform(1e9, 7e9),
    )
    work = Work(micro_batches=rng.choice([1, 1, 4]), compute_s=rng.choice([0.0, 0.05, 1.0]))
    return buckets, Room(device_bytes=device, host_bytes=host, disk_bytes=disk), rates, work


@pytest.mark.parametrize("seed", range(24))
def test_the_step_is_within_5_percent_of_brute_force(seed: int) -> None:
    buckets, room, rates, work = case(seed)
    assert room.device_bytes is not None and room.host_bytes is not None
    best = float("inf")
    for disk in disk_kinds(buckets, room, work):
        inside = Room(
            device_bytes=room.device_bytes,
            host_bytes=room.host_bytes - buffer_bytes(buckets, disk),
            disk_bytes=room.disk_bytes,
        )
        best = min(best, fastest([options(b, rates, work, disk) for b in buckets], inside, work.compute_s))
    assert best < float("inf"), "a case that does not fit shows nothing"
    placed = place(buckets, room, rates, work)
    assert best * (1 - 1e-9) <= placed.step_s <= 1.05 * best, f"{placed.step_s / best:.3f} of the best"
    assert placed.bound_s <= best * (1 + 1e-6), "the linear program is a lower bound"
    assert placed.num_bytes("device") <= room.device_bytes
    assert placed.num_bytes("host") + placed.buffer_bytes <= room.host_bytes
    if room.disk_bytes is not None:
        assert placed.num_bytes("disk") <= room.disk_bytes
    total = sum(sum(b.kinds.values()) for b in buckets)
    assert sum(placed.num_bytes(tier) for tier in ("device", "host", "disk")) == total


@pytest.mark.parametrize("seed", range(6))
def test_values_for_taking_steps_back_are_within_the_budget(seed: int) -> None:
    """`overlap_step` needs a second version of what it changes: on the disk of what is there, else in memory."""
    buckets, room, rates, work = case(seed)
    buckets = [bucket(b.name, b.kinds["grad"] // 4, param="param" in b.kinds, undo=True) for b in buckets]
    work = replace(work, host_reserve_bytes=16 * MIB)
    numel = sum(b.kinds["grad"] // 4 for b in buckets)
    room = replace(room, host_bytes=(room.host_bytes or 0) + 14 * numel + work.host_reserve_bytes)
    assert room.device_bytes is not None and room.host_bytes is not None
    placed = place(buckets, room, rates, work)
    assert sum(placed.undo_bytes.values()) == 14 * numel
    for kind, size in (("master", 4), ("state", 8)):
        assert placed.undo_bytes["disk"] >= placed.num_bytes("disk", kind), f"{size} bytes an element"
    assert placed.num_bytes("device") + placed.undo_bytes["device"] <= room.device_bytes
    on_host = placed.num_bytes("host") + placed.buffer_bytes + placed.undo_bytes["host"] + 16 * MIB
    assert on_host <= room.host_bytes
    assert "to take steps back" in str(placed) and "activations" in str(placed)
    limited = place(buckets, room, rates, replace(work, undo_limit_bytes=MIB))
    assert limited.undo_bytes["device"] == limited.undo_bytes["host"] == MIB
    assert limited.step_s <= placed.step_s
    best = float("inf")
    for disk in disk_kinds(buckets, room, work):
        inside = room.without(0, buffer_bytes(buckets, disk) + 16 * MIB)
        if disk and not placed.kinds("disk"):
            break  # a disk is used only if it has to be
        if inside is not None:
            each = [options(b, rates, work, disk) for b in buckets]
            best = min(best, fastest(each, inside, work.compute_s))
    assert placed.step_s <= 1.05 * best


def test_many_buckets_are_close_to_the_lower_bound() -> None:
    buckets = [bucket(f"b{i}", 16 * MIB if i % 5 else 3 * MIB) for i in range(200)]
    total = sum(sum(b.kinds.values()) for b in buckets)
    room = Room(device_bytes=total // 5, host_bytes=total // 3, disk_bytes=None)
    placed = place(buckets, room)
    assert placed.bound_s <= placed.step_s <= 1.03 * placed.bound_s
    assert place(buckets, room) == placed


def test_more_memory_is_never_slower_and_what_fits_stays_on_the_device() -> None:
    buckets = [bucket(f"b{i}", 8 * MIB) for i in range(10)]
    total = sum(sum(b.kinds.values()) for b in buckets)
    times = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        room = Room(device_bytes=int(share * total), host_bytes=None, disk_bytes=None)
        times.append(place(buckets, room).step_s)
    assert times == sorted(times, reverse=True) and times[0] > 10 * times[-1]
    everything = place(buckets, Room(device_bytes=total, host_bytes=0, disk_bytes=None))
    assert everything.num_bytes("device") == total and everything.buffer_bytes == 0


def test_where_a_slow_disk_is_used_gradients_of_many_micro_batches_avoid_it() -> None:
    buckets = [bucket(f"b{i}", 8 * MIB, param=False) for i in range(12)]
    total = sum(sum(b.kinds.values()) for b in buckets)
    room = Room(device_bytes=0, host_bytes=total // 2 + buffer_bytes(buckets, KINDS), disk_bytes=None)
    placed = place(buckets, room, Rates(), Work(micro_batches=8))
    assert placed.num_bytes("disk", "grad") == 0 and placed.num_bytes("disk", "state") > 0


def test_states_that_cannot_be_paged_stay_in_memory() -> None:
    buckets = [bucket(f"b{i}", 8 * MIB) for i in range(16)]
    total = sum(sum(b.kinds.values()) for b in buckets)
    room = Room(device_bytes=0, host_bytes=int(0.9 * total), disk_bytes=None)
    placed = place(buckets, room, Rates(), Work(pages_states=False))
    assert placed.num_bytes("disk") > 0 and placed.num_bytes("disk", "state") == 0


def test_a_budget_that_is_too_small_is_refused_with_numbers_and_what_would_be_enough() -> None:
    buckets = [bucket(f"b{i}", 64 * MIB) for i in range(4)]  # 4.5 GiB
    room = Room(device_bytes=2**30, host_bytes=2 * 2**30, disk_bytes=0)
    with pytest.raises(BudgetError) as caught:
        place(buckets, room)
    said = str(caught.value)
    assert (
        "takes 4.5 GiB (parameters 512.0 MiB, masters 1.0 GiB, gradients 1.0 GiB, optimizer states 2.0 GiB)"
        in said
    )
    assert "budget (device 1.0 GiB, host 2.0 GiB, disk 0 B)" in said
    for name, field in (("device", "device_bytes"), ("host", "host_bytes"), ("disk", "disk_bytes")):
        size = float(
            said.partition("Enough would be one of: ")[2].partition(f"{name} ")[2].partition(" GiB")[0]
        )
        enough = Room(**{**vars(room), field: int((size + 0.06) * 2**30)})
        place(buckets, enough)  # fits
        with pytest.raises(BudgetError):
            place(buckets, Room(**{**vars(room), field: int(0.9 * size * 2**30)}))


def test_the_table_has_every_kind_and_the_tiers_are_those_of_the_store() -> None:
    buckets = [bucket(f"b{i}", 8 * MIB) for i in range(16)]
    total = sum(sum(b.kinds.values()) for b in buckets)
    host = total // 5 + buffer_bytes(buckets, KINDS)
    placed = place(buckets, Room(device_bytes=total // 4, host_bytes=host, disk_bytes=None))
    table = str(placed)
    for word in (
        "parameters",
        "masters",
        "gradients",
        "optimizer states",
        "buffers",
        "no limit",
        "a step",
        "disk",
    ):
        assert word in table
    items = [
        Reservation(
            key=ShardKey(name=b.name, kind=kind),
            partition=kind,
            numel=1,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        for b in buckets
        for kind in b.kinds
    ]
    for item, tier in zip(items, placed.tiers(items), strict=True):
        index = next(i for i, b in enumerate(buckets) if b.name == item.key.name)
        assert placed.choices[index].of(item.key.kind) == tier
    assert placed.kinds("disk") == {
        k for k in ("param", "master", "grad", "state") if placed.num_bytes("disk", k)
    }


def test_a_linear_program() -> None:
    # max 3x + 2y with x + y <= 4, x + 3y <= 6, x <= 3; then with x = 1
    rows = [([1.0, 1.0], 4.0), ([1.0, 3.0], 6.0), ([1.0, 0.0], 3.0)]
    assert minimize([-3.0, -2.0], rows, []) == pytest.approx([3.0, 1.0])
    assert minimize([-3.0, -2.0], rows, [([1.0, 0.0], 1.0)]) == pytest.approx([1.0, 5 / 3])
    assert minimize([1.0], [([1.0], 1.0)], [([1.0], 2.0)]) is None


def test_seconds_of_one_kind_of_work_overlap() -> None:
    times = Seconds(load_link=1, load_disk=3, host=2, link=1, disk=5, device=0.5)
    assert times.total(0.0) == 3 + 5 + 0.5
    assert times.total(2.0) == 1 + 5 + 0.5
    assert times.total(9.0) == 5.5
