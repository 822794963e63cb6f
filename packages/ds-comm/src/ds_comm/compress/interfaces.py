"""What a compressor is."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ds_comm.compress.blocks import Blocks


class Compressor(Protocol):
    """Encodes a 1-D fp32, bf16 or fp16 tensor as a payload: a uint8 tensor, whose size depends only on the blocks.

    A compressor has no state; what is lost in a call is kept by the caller, in `residual`.
    """

    @property
    def block_numel(self) -> int:
        """Largest number of elements that share a scale."""

    def payload_bytes(self, blocks: Blocks) -> int:
        """Returns the size of the payload of a tensor that is cut into `blocks`, a multiple of 16."""

    def payload_like(self, blocks: Blocks, device: torch.device) -> Tensor:
        """Returns a new payload with undefined contents."""

    def encode(
        self, x: Tensor, payload: Tensor, blocks: Blocks, *, residual: Tensor | None = None, seed: int = 0
    ) -> None:
        """Encodes `x`, or `x + residual`, into `payload`. What is lost is written to `residual`.

        Args:
            x: the tensor.
            payload: see `payload_like`.
            blocks: of `x`.
            residual: of the size of `x`.
            seed: of stochastic rounding, for compressors that use it; it should differ between calls and ranks.
        """

    def decode(
        self, payload: Tensor, out: Tensor, blocks: Blocks, *, weight: float = 1.0, add: bool = False
    ) -> None:
        """Writes the decoded values times `weight` to `out`, or adds them."""
