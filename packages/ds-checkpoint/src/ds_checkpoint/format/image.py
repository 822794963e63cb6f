"""The bytes of a data file in page-aligned memory: tensors are copied into it once, and it is written without a
further copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_checkpoint.disk.buffers import aligned
from ds_checkpoint.disk.crc import crc32c
from ds_checkpoint.format.datafile import Layout


class Image:
    """The bytes of one data file, page-aligned for direct I/O ([Note: direct writes])."""

    def __init__(self, layout: Layout, *, pinned: bool) -> None:
        """`pinned`: use page-locked memory, for copies from an accelerator."""
        self.layout = layout
        size = layout.num_bytes
        # Page-locked memory is page-aligned.
        self.content = torch.empty(size, dtype=torch.uint8, pin_memory=True) if pinned else aligned(size)
        """1-D uint8."""
        header = torch.frombuffer(bytearray(layout.header), dtype=torch.uint8)
        self.content[: len(header)].copy_(header)
        self._sums: dict[str, str] = {}
        self._places: dict[str, Tensor] = {}

    def place(self, key: str, like: Tensor) -> Tensor:
        """Returns a 1-D view at the position of the tensor `key`, with the dtype and number of elements of `like`."""
        if key not in self._places:
            begin = self.layout.begins[key]
            self._places[key] = self.content[begin : begin + like.nbytes].view(like.dtype)
        return self._places[key]

    def copy(self, key: str, data: Tensor) -> None:
        """Copies a CPU tensor to its position, without holding the GIL."""
        self.place(key, data).view(torch.uint8).numpy()[:] = data.detach().view(torch.uint8).numpy()

    def fill(self, key: str, data: Tensor) -> None:
        """Copies a CPU tensor to its position, and computes the checksum of each block while it is in the cache. Uses
        one core without holding the GIL; torch's own copy would start a team of threads.
        """
        source, target = data.detach().view(torch.uint8).numpy(), self.place(key, data).view(torch.uint8)
        digits = []
        for begin in range(0, data.nbytes, self.layout.block_bytes):
            block = target[begin : begin + self.layout.block_bytes]
            block.numpy()[:] = source[begin : begin + self.layout.block_bytes]
            digits.append(crc32c(block))
        self._sums[key] = "".join(digits)

    def forget_sums(self) -> None:
        """Discards the checksums, because the tensors will change."""
        self._sums.clear()

    def sums(self, key: str, like: Tensor) -> str:
        """Returns the concatenated checksums of a tensor's blocks, eight digits each."""
        if key not in self._sums:
            raw, size = self.place(key, like).view(torch.uint8), self.layout.block_bytes
            self._sums[key] = "".join(crc32c(raw[i : i + size]) for i in range(0, raw.numel(), size))
        return self._sums[key]
