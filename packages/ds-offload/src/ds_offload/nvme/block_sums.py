"""Checksums of the blocks of a stored tensor, to detect that a disk returns other values than were written."""

from __future__ import annotations

from torch import Tensor

from ds_core.kernels import crc32c
from ds_offload.nvme.options import Verify

BLOCK_BYTES = 1 << 20
_SAMPLE = 16
"""With "sampled", one in so many blocks has a checksum."""


class BlockSums:
    """CRC-32C of blocks of `BLOCK_BYTES` of one tensor. A block that was written in part has none."""

    def __init__(self, num_bytes: int, verify: Verify) -> None:
        self._num_bytes, self._verify = num_bytes, verify
        self._num_blocks = -(-num_bytes // BLOCK_BYTES)
        self._sums: dict[int, int] = {}
        self._num_writes = 0

    def written(self, begin: int, data: Tensor) -> None:
        """Notes that `data` (1-D, uint8) is written from byte `begin` on."""
        end = begin + data.numel()
        self._num_writes += 1
        for block in range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
            first = block * BLOCK_BYTES
            last = min(first + BLOCK_BYTES, self._num_bytes)
            whole = begin <= first and last <= end
            if whole and self._is_chosen(block):
                self._sums[block] = crc32c(data[first - begin : last - begin])
            else:
                self._sums.pop(block, None)

    def first_difference(self, begin: int, data: Tensor) -> int | None:
        """Compares `data` (1-D, uint8), which was read from byte `begin` on.

        Returns:
            The first byte, in the stored tensor, of the first block whose checksum differs; None if there is none.
        """
        end = begin + data.numel()
        for block, expected in sorted(self._sums.items()):
            first = block * BLOCK_BYTES
            last = min(first + BLOCK_BYTES, self._num_bytes)
            if begin <= first and last <= end and crc32c(data[first - begin : last - begin]) != expected:
                return first
        return None

    def _is_chosen(self, block: int) -> bool:
        if self._verify != "sampled":
            return self._verify == "full"
        edge = block in (0, self._num_blocks - 1)
        return edge or block % _SAMPLE == self._num_writes % _SAMPLE
