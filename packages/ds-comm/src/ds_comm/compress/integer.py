"""4 or 8 bits per element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ds_comm.compress.blocks import Blocks
from ds_comm.compress.payload import scaled_bytes, scales_and_codes
from ds_core import codes


@dataclass(frozen=True, kw_only=True)
class IntCompressor:
    """Signed integers with one scale per block: bits + 32 / block_numel bits per element.

    Stochastic rounding is unbiased: errors of many calls cancel, also without residuals. Rounding to nearest has the
    smaller error in one call.
    """

    bits: int = 8
    """4 or 8."""
    block_numel: int = 256
    """Elements that share a scale, at most 4096."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How values between two codes are rounded."""

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"IntCompressor: bits must be 4 or 8, but is {self.bits}")
        if not 8 <= self.block_numel <= codes.MAX_BLOCK_NUMEL or self.block_numel % 8:
            raise ValueError(
                f"IntCompressor: block_numel must be a multiple of 8 between 8 and {codes.MAX_BLOCK_NUMEL}, "
                f"but is {self.block_numel}"
            )
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(
                f'IntCompressor: rounding must be "nearest" or "stochastic", but is {self.rounding!r}'
            )

    def payload_bytes(self, blocks: Blocks) -> int:
        """See `Compressor`."""
        return scaled_bytes(len(blocks), blocks.numel, self.bits)

    def payload_like(self, blocks: Blocks, device: torch.device) -> Tensor:
        """See `Compressor`."""
        return torch.empty(self.payload_bytes(blocks), dtype=torch.uint8, device=device)

    def encode(
        self, x: Tensor, payload: Tensor, blocks: Blocks, *, residual: Tensor | None = None, seed: int = 0
    ) -> None:
        """See `Compressor`."""
        scales, packed = scales_and_codes(payload, blocks, self.bits)
        number = seed if self.rounding == "stochastic" else None
        codes.int_encode(x, blocks.table, scales, packed, residual, bits=self.bits, seed=number)

    def decode(
        self, payload: Tensor, out: Tensor, blocks: Blocks, *, weight: float = 1.0, add: bool = False
    ) -> None:
        """See `Compressor`."""
        scales, packed = scales_and_codes(payload, blocks, self.bits)
        codes.int_decode(scales, packed, blocks.table, out, bits=self.bits, weight=weight, add=add)
