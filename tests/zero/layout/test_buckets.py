"""Layout arithmetic: every element has exactly one owner, whatever the shapes and rank counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_zero.layout.buckets import (
    ALIGN_NUMEL,
    ParamInfo,
    assign_whole,
    default_persistence_numel,
    keep_small_whole,
    piece_of,
    plan_buckets,
    split_by_size,
)

shapes = st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=12)
units = st.sampled_from([None, "a", "b"])


@st.composite
def params(draw: st.DrawFn) -> list[ParamInfo]:
    return [
        ParamInfo(
            fqn=f"p{i}",
            shape=shape,
            dtype=draw(st.sampled_from(["float32", "bfloat16"])),
            group=draw(st.integers(-1, 1)),
            unit=draw(units),
        )
        for i, shape in enumerate(draw(shapes))
    ]


@given(params(), st.integers(1, 9), st.booleans(), st.integers(1, 500))
def test_every_element_has_one_owner(
    infos: list[ParamInfo], ranks: int, owners: bool, bucket_numel: int
) -> None:
    buckets = plan_buckets(infos, num_ranks=ranks, owners=owners, bucket_numel=bucket_numel)
    found = {slot.fqn: slot for b in buckets for slot in b.slots}
    assert sorted(found) == sorted(i.fqn for i in infos)
    for bucket in buckets:
        assert bucket.padded_numel % (ranks * ALIGN_NUMEL) == 0
        for slot in bucket.slots:
            owned = [piece_of(slot, *bucket.slice_range(r)) for r in range(ranks)]
            covered = [i for p in owned for i in range(p.start, p.start + p.numel)]
            assert covered == list(range(slot.numel))
            for rank, piece in enumerate(owned):
                assert piece.offset % ALIGN_NUMEL == 0 or piece.start == 0 or piece.numel == 0
                if piece.numel:
                    assert bucket.slice_range(rank)[0] + piece.offset == slot.offset + piece.start
                    # Cuts within a parameter fall on cache lines of the parameter, too.
                    assert piece.start % ALIGN_NUMEL == 0
        assert bucket.owned_numel == (bucket.slice_numel if owners else bucket.padded_numel)


@given(params(), st.integers(1, 9), st.integers(1, 500))
def test_whole_tensors_have_one_owner_each(infos: list[ParamInfo], ranks: int, bucket_numel: int) -> None:
    infos = [replace(i, undivided=True, group=0) for i in infos]
    loads = [0] * ranks
    for bucket in plan_buckets(infos, num_ranks=ranks, owners=True, bucket_numel=bucket_numel):
        ranges = [bucket.slice_range(r) for r in range(ranks)]
        assert [b for b, _ in ranges] == [0, *(e for _, e in ranges[:-1])]
        assert ranges[-1][1] == bucket.padded_numel
        assert all(begin % ALIGN_NUMEL == 0 for begin, _ in ranges)
        assert bucket.slice_sizes == [e - b for b, e in ranges]
        for slot in bucket.slots:
            pieces = [piece_of(slot, *r) for r in ranges]
            owners = [r for r, p in enumerate(pieces) if p.numel]
            assert [pieces[r].numel for r in owners] == ([slot.numel] if slot.numel else [])
            for r in owners:
                loads[r] += -(-slot.numel // ALIGN_NUMEL) * ALIGN_NUMEL
    largest = max(-(-i.numel // ALIGN_NUMEL) * ALIGN_NUMEL for i in infos)
    assert max(loads) <= sum(loads) / ranks + largest


@given(params(), st.integers(1, 5))
def test_axes_do_not_mix(infos: list[ParamInfo], ranks: int) -> None:
    infos = [replace(info, axis=i % 2) for i, info in enumerate(infos)]
    axis_of = {i.fqn: i.axis for i in infos}
    for bucket in plan_buckets(infos, num_ranks=[ranks, 2 * ranks], owners=True, bucket_numel=100):
        assert {axis_of[s.fqn] for s in bucket.slots} == {bucket.axis}
        assert bucket.num_ranks == ranks * (1 + bucket.axis)


@pytest.mark.parametrize(
    "sizes, ranks, owners",
    [([64, 32, 32], 2, [0, 1, 1]), ([32, 96, 64, 64], 2, [0, 0, 1, 1]), ([10], 3, [0]), ([], 2, [])],
)
def test_assign_whole(sizes: list[int], ranks: int, owners: list[int]) -> None:
    assert assign_whole(sizes, ranks) == owners


@given(params(), st.integers(1, 5), st.integers(1, 500))
def test_slots_and_gaps_fill_the_bucket(infos: list[ParamInfo], ranks: int, bucket_numel: int) -> None:
    for bucket in plan_buckets(infos, num_ranks=ranks, owners=True, bucket_numel=bucket_numel):
        spans = sorted([(s.offset, s.end) for s in bucket.slots if s.numel] + bucket.gaps())
        assert [b for a, b in spans][:-1] == [a for a, b in spans][1:]
        assert not spans or (spans[0][0] == 0 and spans[-1][1] == bucket.padded_numel)


@given(params(), st.integers(1, 500))
def test_a_bucket_is_of_one_kind_and_size(infos: list[ParamInfo], bucket_numel: int) -> None:
    by_name = {i.fqn: i for i in infos}
    for bucket in plan_buckets(infos, num_ranks=2, owners=True, bucket_numel=bucket_numel):
        kinds = {(by_name[s.fqn].group, by_name[s.fqn].dtype, by_name[s.fqn].unit) for s in bucket.slots}
        assert kinds == {(bucket.group, bucket.dtype, bucket.unit)}
        if bucket.unit is None and len(bucket.slots) > 1:
            assert sum(s.numel for s in bucket.slots) <= bucket_numel


def test_buckets_come_in_the_order_of_backward() -> None:
    infos = [ParamInfo(fqn=f"p{i}", shape=(10,), dtype="float32", group=0) for i in range(6)]
    buckets = plan_buckets(infos, num_ranks=2, owners=True, bucket_numel=20)
    assert [[s.fqn for s in b.slots] for b in buckets] == [["p4", "p5"], ["p2", "p3"], ["p0", "p1"]]


def test_the_plan_does_not_depend_on_anything_but_its_arguments() -> None:
    infos = [
        ParamInfo(fqn=f"p{i}", shape=(i, 7), dtype="float32", group=i % 2, unit=f"u{i % 3}") for i in range(9)
    ]
    assert plan_buckets(infos, num_ranks=3, owners=True, bucket_numel=50) == plan_buckets(
        list(infos), num_ranks=3, owners=True, bucket_numel=50
    )


@pytest.mark.parametrize("sizes, runs", [([5, 5, 5], [[5, 5], [5]]), ([20, 1], [[20], [1]]), ([], [])])
def test_split_by_size(sizes: list[int], runs: list[list[int]]) -> None:
    infos = [ParamInfo(fqn=str(i), shape=(n,), dtype="f", group=0) for i, n in enumerate(sizes)]
    assert [[p.numel for p in run] for run in split_by_size(infos, 10)] == runs


def test_only_two_percent_of_a_model_stay_whole_by_default() -> None:
    big = [ParamInfo(fqn=f"w{i}", shape=(1000, 100), dtype="f", group=0, unit="u") for i in range(4)]
    small = [ParamInfo(fqn=f"b{i}", shape=(1000,), dtype="f", group=0, unit="u") for i in range(4)]
    assert default_persistence_numel(big + small) == 1000
    assert default_persistence_numel(big[:1] + small) == 0
    kept = keep_small_whole(big + small, 1000)
    assert [p.unit for p in kept] == ["u"] * 4 + [None] * 4


def test_equal_sizes_stand_or_fall_together() -> None:
    infos = [ParamInfo(fqn=f"b{i}", shape=(10,), dtype="f", group=0, unit="u") for i in range(100)]
    assert default_persistence_numel(infos) == 0
