"""Sums of the bytes of tensors."""

from __future__ import annotations

import pytest
import torch

from ds_zero.tensors.block_sums import BLOCK_BYTES, block_sums, mixed_sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool])
@pytest.mark.parametrize("numel", [0, 1, 3, 8, 4097, 70_001])
def test_equal_bytes_give_equal_sums_wherever_they_lie(dtype: torch.dtype, numel: int) -> None:
    values = torch.randint(0, 2, (numel,)).to(dtype)
    elsewhere = torch.empty(numel + 1, dtype=dtype)[1:]  # another alignment
    elsewhere.copy_(values)
    assert torch.equal(block_sums(values), block_sums(elsewhere))
    assert int(mixed_sum(values)) == int(mixed_sum(elsewhere))


def test_every_single_bit_changes_the_sum_and_one_block() -> None:
    values = torch.randn(3 * BLOCK_BYTES // 4 + 5)
    before, sums = int(mixed_sum(values)), block_sums(values)
    words = values.view(torch.int32)
    for index in (0, 17, BLOCK_BYTES // 4, values.numel() - 1):
        for bit in range(32):
            words[index] ^= torch.tensor(1 << bit).to(torch.int32)
            assert int(mixed_sum(values)) != before
            assert (block_sums(values) != sums).nonzero().flatten().tolist() == [index * 4 // BLOCK_BYTES]
            words[index] ^= torch.tensor(1 << bit).to(torch.int32)
    assert int(mixed_sum(values)) == before


def test_exchanged_blocks_are_noticed() -> None:
    values = torch.randn(2, BLOCK_BYTES // 4)
    assert int(mixed_sum(values)) != int(mixed_sum(values.flip(0)))


def test_0_dim_and_strided_tensors() -> None:
    assert int(mixed_sum(torch.tensor(2.0))) == int(mixed_sum(torch.tensor([2.0])))
    matrix = torch.randn(6, 4)
    assert int(mixed_sum(matrix.t())) == int(mixed_sum(matrix.t().contiguous()))
