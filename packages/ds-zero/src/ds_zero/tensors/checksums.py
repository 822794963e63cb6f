"""Checksums of the blocks of tensors, in plain torch: what an optimizer's `checksums` computes faster.

[Note: checksum of a block]
A block is `CHECKSUM_BLOCK_NUMEL` elements. Its bytes are read as words w_i of 32 bits, the last one filled up with
zeros. The checksum is the sum of w_i * a_i modulo 2^64, where a_i = (2 i + 1) * 0x9E3779B1 modulo 2^32. The a_i are odd
and distinct, so that any change of one word, any two flipped bits, and two exchanged words always change the checksum;
other changes do so with a probability of 1 - 2^-64. `ds_core.kernels.checksums` computes the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHECKSUM_BLOCK_NUMEL = 4096
_FACTOR = 0x9E3779B1
_WORD = 0xFFFFFFFF
_BLOCKS_AT_ONCE = 64
"""Blocks whose words, widened to 64 bits, are in memory at the same time."""


def num_checksums(numel: int) -> int:
    """Returns the number of blocks of a tensor of `numel` elements."""
    return -(-numel // CHECKSUM_BLOCK_NUMEL)


def checksums(tensors: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Writes the checksums of each tensor's blocks to `out`, 1-D int64 tensors on its device."""
    for tensor, sums in zip(tensors, out, strict=True):
        data = tensor.detach().contiguous().view(-1)
        begin = 0
        for part in data.split(_BLOCKS_AT_ONCE * CHECKSUM_BLOCK_NUMEL) if data.numel() else ():
            count = num_checksums(part.numel())
            sums[begin : begin + count] = _sums(part, count)
            begin += count


def _sums(part: Tensor, count: int) -> Tensor:
    block_bytes = CHECKSUM_BLOCK_NUMEL * part.element_size()
    padded = torch.zeros(count * block_bytes, dtype=torch.uint8, device=part.device)  # at an aligned address
    padded[: part.nbytes] = part.view(torch.uint8)
    words = padded.view(torch.int32).to(torch.int64).bitwise_and_(_WORD)
    index = torch.arange(block_bytes // 4, device=part.device)
    weights = ((2 * index + 1) * _FACTOR).bitwise_and_(_WORD)
    return words.view(count, -1).mul_(weights).sum(1)  # torch's int64 wraps at 2^64
