"""Ranges of a flattened tensor as rectangular blocks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_zero.tensors.logical_tensor import LogicalTensor, blocks, parts


@given(shape=st.lists(st.integers(1, 5), max_size=4), data=st.data())
def test_blocks_cover_a_range_once_and_in_order(shape: list[int], data: st.DataObject) -> None:
    numel = math.prod(shape)
    begin = data.draw(st.integers(0, numel))
    end = data.draw(st.integers(begin, numel))
    whole = torch.arange(numel).view(shape)
    made = list(blocks(shape, begin, end))
    assert len(made) <= max(1, 2 * len(shape) - 1)
    read = []
    for block in made:
        part = whole
        for dim, (offset, size) in enumerate(zip(block.offsets, block.sizes, strict=True)):
            part = part.narrow(dim, offset, size)
        assert part.shape == block.sizes and part.is_contiguous()
        read += part.flatten().tolist()
    assert read == list(range(begin, end))


@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 64), min_size=4, max_size=4),
)
def test_parts_are_views_and_say_which_are_written(shape: list[int], cuts: list[int]) -> None:
    numel = math.prod(shape)
    begin, low, high, end = sorted(min(cut, numel) for cut in cuts)
    values = torch.arange(numel)[begin:end]
    held = parts(shape, begin, values, (low, high))
    assert sum(view.numel() for _, view, _ in held) == end - begin
    assert [x for _, view, written in held if written for x in view.flatten().tolist()] == list(
        range(low, high)
    )
    assert all(
        view.untyped_storage().data_ptr() == values.untyped_storage().data_ptr() for _, view, _ in held
    )
    assert len({offsets for offsets, view, _ in held if numel}) == len(held if numel else [])
    assert not any(written for *_, written in parts(shape, begin, values, None))


def test_it_has_no_values_for_anybody_else() -> None:
    tensor = LogicalTensor.of((3, 4), torch.zeros(0, dtype=torch.bfloat16), [])
    assert tensor.shape == (3, 4) and tensor.dtype is torch.bfloat16
    with pytest.raises(ValueError, match=r"add: this tensor has a rank's elements only.*get_full"):
        tensor + 1
    with pytest.raises(TypeError, match="cannot be pickled"):
        torch.save(tensor, "/dev/null")
