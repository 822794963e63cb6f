"""Blocks: where tensors lie, and how a buffer is divided."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_comm.compress import Blocks


def test_tensors_lie_one_behind_the_other() -> None:
    blocks, offsets = Blocks.of([100, 0, 64, 5000], 2048)
    assert offsets == [0, 128, 128, 192]
    assert blocks.numel == 192 + 5056
    assert blocks.table.tolist() == [[0, 100], [128, 64], [192, 2048], [2240, 2048], [4288, 904]]


@given(st.lists(st.integers(0, 9000), max_size=8), st.sampled_from([8, 256, 2048]), st.integers(1, 7))
def test_parts_cover_the_buffer_once(numels: list[int], block_numel: int, parts: int) -> None:
    blocks, _ = Blocks.of(numels, block_numel)
    assert int(blocks.table[:, 1].sum()) == sum(numels)
    rows, end = [], 0
    cut = blocks.cut(parts)
    for start, part in cut:
        assert start == end
        end = start + part.numel
        rows += [[begin + start, numel] for begin, numel in part.table.tolist()]
        assert all(0 <= begin and begin + numel <= part.numel for begin, numel in part.table.tolist())
    assert end == blocks.numel
    assert rows == blocks.table.tolist()
    largest = max([block_numel, 64, *numels]) if len(blocks) < parts else max(block_numel, 64)
    assert all(abs(part.numel - blocks.numel / parts) <= 2 * largest for _, part in cut)


def test_a_block_has_elements() -> None:
    with pytest.raises(ValueError, match="block_numel must be positive, but is 0"):
        Blocks.uniform(10, 0)
