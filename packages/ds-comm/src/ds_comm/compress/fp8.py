"""8-bit floating point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_comm.compress.blocks import Blocks
from ds_comm.compress.payload import scaled_bytes, scales_and_codes
from ds_comm.compress.rows import Rows


@dataclass(frozen=True, kw_only=True)
class Fp8Compressor:
    """8-bit floating point, e4m3 or e5m2, with one scale per block: 8 + 32 / block_numel bits per element.

    The largest magnitude of a block becomes the largest finite number. The relative error of an element is at most 1/16
    (e4m3) or 1/8 (e5m2), also for elements much smaller than the largest one of their block, where integers have an
    absolute error.
    """

    dtype: torch.dtype = torch.float8_e4m3fn
    """torch.float8_e4m3fn or torch.float8_e5m2."""
    block_numel: int = 256
    """Elements that share a scale."""

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
            raise ValueError(
                f"Fp8Compressor: dtype must be torch.float8_e4m3fn or torch.float8_e5m2, but is {self.dtype}"
            )
        if self.block_numel < 1:
            raise ValueError(f"Fp8Compressor: block_numel must be positive, but is {self.block_numel}")

    def payload_bytes(self, blocks: Blocks) -> int:
        """See `Compressor`."""
        return scaled_bytes(len(blocks), blocks.numel, 8)

    def payload_like(self, blocks: Blocks, device: torch.device) -> Tensor:
        """See `Compressor`."""
        return torch.empty(self.payload_bytes(blocks), dtype=torch.uint8, device=device)

    @torch.no_grad()
    def encode(
        self, x: Tensor, payload: Tensor, blocks: Blocks, *, residual: Tensor | None = None, seed: int = 0
    ) -> None:
        """See `Compressor`."""
        scales, packed = scales_and_codes(payload, blocks, 8)
        rows = Rows(blocks, self.block_numel, x.device)
        values = rows.take(x, residual)
        largest = torch.finfo(self.dtype).max
        scale = values.abs().amax(1) / largest
        scale = torch.where(scale < torch.finfo(torch.float32).tiny, 0.0, scale)
        inverse = torch.where(scale > 0.0, 1.0 / scale, 0.0)[:, None]
        codes = (values * inverse).clamp(-largest, largest).to(self.dtype)
        scales.copy_(scale)
        packed[rows.index[rows.mask]] = codes.view(torch.uint8)[rows.mask]
        if residual is not None:
            rows.put(values - codes.to(torch.float32) * scale[:, None], residual)

    @torch.no_grad()
    def decode(
        self, payload: Tensor, out: Tensor, blocks: Blocks, *, weight: float = 1.0, add: bool = False
    ) -> None:
        """See `Compressor`."""
        scales, packed = scales_and_codes(payload, blocks, 8)
        rows = Rows(blocks, self.block_numel, out.device)
        codes = packed[rows.index].view(self.dtype).to(torch.float32)
        rows.put(codes * scales[:, None], out, weight=weight, add=add)
