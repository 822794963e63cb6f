"""The largest elements of each block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_comm.compress.blocks import Blocks
from ds_comm.compress.rows import Rows

_BYTES = 4  # a bf16 value and a 16-bit index


@dataclass(frozen=True, kw_only=True)
class TopKCompressor:
    """The `kept` elements of largest magnitude of each block, in bf16, with 16-bit indices: 32 * kept / block_numel
    bits per element. The others are in the residual until they are large enough.

    Choosing within blocks rather than in the whole tensor gives payloads of a size known beforehand, and needs no sort
    of the whole tensor. For the outer step of local methods, where residuals are used up over many steps.
    """

    block_numel: int = 4096
    """Elements among which the largest are chosen, at most 65536."""
    kept: int = 64
    """Elements that are sent from each block."""

    def __post_init__(self) -> None:
        if not 1 <= self.block_numel <= 65536:
            raise ValueError(
                f"TopKCompressor: block_numel must lie between 1 and 65536, but is {self.block_numel}"
            )
        if not 1 <= self.kept <= self.block_numel:
            raise ValueError(
                f"TopKCompressor: kept must lie between 1 and block_numel = {self.block_numel}, but is {self.kept}"
            )

    def payload_bytes(self, blocks: Blocks) -> int:
        """See `Compressor`."""
        return -(-len(blocks) * self.kept * _BYTES // 16) * 16

    def payload_like(self, blocks: Blocks, device: torch.device) -> Tensor:
        """See `Compressor`."""
        return torch.zeros(self.payload_bytes(blocks), dtype=torch.uint8, device=device)

    def _parts(self, payload: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
        numel = len(blocks) * self.kept
        words = payload[: numel * _BYTES].view(torch.int16)
        return (
            words[:numel].view(torch.bfloat16).view(-1, self.kept),
            words[numel:].view(-1, self.kept),
        )

    @torch.no_grad()
    def encode(
        self, x: Tensor, payload: Tensor, blocks: Blocks, *, residual: Tensor | None = None, seed: int = 0
    ) -> None:
        """See `Compressor`."""
        values, indices = self._parts(payload, blocks)
        rows = Rows(blocks, self.block_numel, x.device)
        whole = rows.take(x, residual)
        chosen = torch.topk(whole.abs().nan_to_num(torch.inf), self.kept, dim=1, sorted=False).indices
        sent = whole.gather(1, chosen).to(torch.bfloat16)
        values.copy_(sent)
        indices.copy_(chosen)  # wraps above 32767; `decode` undoes it
        if residual is not None:
            rows.put(whole.scatter_add(1, chosen, -sent.to(torch.float32)), residual)

    @torch.no_grad()
    def decode(
        self, payload: Tensor, out: Tensor, blocks: Blocks, *, weight: float = 1.0, add: bool = False
    ) -> None:
        """See `Compressor`."""
        values, indices = self._parts(payload, blocks)
        rows = Rows(blocks, self.block_numel, out.device)
        whole = torch.zeros(len(blocks), self.block_numel, dtype=torch.float32, device=out.device)
        whole.scatter_add_(1, indices.to(torch.int64).bitwise_and(0xFFFF), values.to(torch.float32))
        rows.put(whole, out, weight=weight, add=add)
