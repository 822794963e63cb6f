"""One bit per element."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_comm.compress.blocks import Blocks
from ds_comm.compress.payload import scaled_bytes, scales_and_codes
from ds_core import codes


@dataclass(frozen=True, kw_only=True)
class SignCompressor:
    """The sign of each element, and the mean magnitude of each block: 1 + 32 / block_numel bits per element.

    The papers of the 1-bit optimizers use one scale for a whole tensor or for all tensors. Small blocks lose less,
    because magnitudes differ between tensors and between rows; see docs/notes/onebit.md.
    """

    block_numel: int = 2048
    """Elements that share a scale, at most 4096."""

    def __post_init__(self) -> None:
        if not 8 <= self.block_numel <= codes.MAX_BLOCK_NUMEL or self.block_numel % 8:
            raise ValueError(
                f"SignCompressor: block_numel must be a multiple of 8 between 8 and {codes.MAX_BLOCK_NUMEL}, "
                f"but is {self.block_numel}"
            )

    def payload_bytes(self, blocks: Blocks) -> int:
        """See `Compressor`."""
        return scaled_bytes(len(blocks), blocks.numel, 1)

    def payload_like(self, blocks: Blocks, device: torch.device) -> Tensor:
        """See `Compressor`."""
        return torch.empty(self.payload_bytes(blocks), dtype=torch.uint8, device=device)

    def encode(
        self, x: Tensor, payload: Tensor, blocks: Blocks, *, residual: Tensor | None = None, seed: int = 0
    ) -> None:
        """See `Compressor`."""
        scales, bits = scales_and_codes(payload, blocks, 1)
        codes.sign_encode(x, blocks.table, scales, bits, residual)

    def decode(
        self, payload: Tensor, out: Tensor, blocks: Blocks, *, weight: float = 1.0, add: bool = False
    ) -> None:
        """See `Compressor`."""
        scales, bits = scales_and_codes(payload, blocks, 1)
        codes.sign_decode(scales, bits, blocks.table, out, weight=weight, add=add)
