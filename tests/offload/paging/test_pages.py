"""Dividing states into pages."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_offload.paging.pages import Sized, divide

DTYPES = st.dictionaries(
    st.sampled_from(["exp_avg", "exp_avg_sq", "buffer"]), st.sampled_from([torch.float32, torch.bfloat16])
)


@given(
    params=st.lists(st.tuples(st.integers(0, 20_000), DTYPES), max_size=12),
    page_bytes=st.integers(12_288, 200_000),
)
def test_every_state_of_every_element_has_its_own_place(
    params: list[tuple[int, dict[str, torch.dtype]]], page_bytes: int
) -> None:
    pages = divide([Sized(index, numel, dtypes) for index, (numel, dtypes) in enumerate(params)], page_bytes)
    covered: dict[int, int] = {}
    for page in pages:
        assert 0 < page.num_bytes <= page_bytes
        taken: list[tuple[int, int]] = []
        for part in page.parts:
            assert part.start == covered.get(part.param, 0), "parts follow each other"
            covered[part.param] = part.start + part.numel
            assert part.offsets.keys() == params[part.param][1].keys()
            for begin, dtype in part.offsets.values():
                assert begin % 64 == 0
                taken.append((begin, begin + part.numel * dtype.itemsize))
        taken.sort()
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(taken))
        assert taken[-1][1] <= page.num_bytes
    assert covered == {i: numel for i, (numel, dtypes) in enumerate(params) if numel and dtypes}


def test_pages_are_filled() -> None:
    two = {"a": torch.float32, "b": torch.float32}
    pages = divide([Sized(i, 100_000, two) for i in range(10)], 1 << 20)
    assert len(pages) == -(-10 * 100_000 // ((1 << 20) // 8))


def test_a_page_that_is_too_small_is_refused() -> None:
    with pytest.raises(
        ValueError, match="page_bytes=100: a page must hold at least 1024 elements, 4096 bytes"
    ):
        divide([Sized(0, 10, {"a": torch.float32})], 100)


def test_tensors_that_must_be_whole_are_in_one_page() -> None:
    one = {"momentum": torch.float32}
    sizes = [1000, 9000, 2000, 2000, 30_000, 10]
    pages = divide([Sized(i, n, one, whole=True) for i, n in enumerate(sizes)], 40_000)
    assert [[(part.param, part.numel) for part in page.parts] for page in pages] == [
        [(0, 1000)],
        [(1, 9000)],
        [(2, 2000), (3, 2000)],
        [(4, 30_000)],
        [(5, 10)],
    ]
    assert pages[3].num_bytes == 120_000
