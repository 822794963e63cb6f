"""The huge-page arena."""

from __future__ import annotations

import gc

import pytest
import torch

from ds_core import arena


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
@pytest.mark.parametrize("numel", [1, 1000, 5_000_000])
def test_tensors_are_ordinary_and_aligned(dtype: torch.dtype, numel: int) -> None:
    x = arena.empty(numel, dtype)
    assert x.shape == (numel,)
    assert x.dtype == dtype
    assert x.is_contiguous()
    assert x.data_ptr() % 64 == 0
    x.fill_(3)
    assert (x + x)[-1].item() == 6


def test_shapes() -> None:
    assert arena.empty((3, 4)).shape == (3, 4)
    assert arena.empty(0).numel() == 0
    assert torch.equal(arena.zeros((100, 7)), torch.zeros(100, 7))


def test_memory_lives_as_long_as_the_last_view() -> None:
    gc.collect()
    before = arena.stats()
    x = arena.empty(1_000_000)
    view = x[10:20]
    view.fill_(5.0)
    during = arena.stats()
    assert during.in_use_bytes - before.in_use_bytes == 4_000_000
    assert during.num_blocks == before.num_blocks + 1
    assert during.reserved_bytes >= during.in_use_bytes
    del x
    assert arena.stats().num_blocks == during.num_blocks
    assert view.tolist() == [5.0] * 10
    del view
    assert arena.stats().in_use_bytes == before.in_use_bytes


def test_zeros_are_zero_in_memory_that_was_used_before() -> None:
    keep = arena.empty(16)
    x = arena.empty(300_000)
    x.fill_(7.0)
    address = x.data_ptr()
    del x
    y = arena.zeros(300_000)
    assert y.data_ptr() == address
    assert y.count_nonzero() == 0
    del keep


def test_memory_that_the_system_does_not_have_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        MemoryError, match=r"cannot allocate 4,611,686,018,427,387,904 bytes .* \(torch.float32\)"
    ):
        arena.empty(1 << 60)
