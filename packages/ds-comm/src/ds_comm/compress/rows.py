"""Blocks as the rows of a matrix, for compressors that are written in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_comm.compress.blocks import Blocks


class Rows:
    """Takes blocks out of a 1-D tensor into the rows of a matrix, filled up with zeros, and puts them back."""

    def __init__(self, blocks: Blocks, width: int, device: torch.device) -> None:
        table = blocks.table.to(device)
        lanes = torch.arange(width, device=device)
        self.mask = lanes < table[:, 1:]
        self.index = torch.where(self.mask, table[:, :1] + lanes, table[:, :1])

    def take(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Returns `x`, or `x + residual`, in fp32."""
        values = x[self.index].to(torch.float32)
        if residual is not None:
            values = values + residual[self.index].to(torch.float32)
        return torch.where(self.mask, values, 0.0)

    def put(self, values: Tensor, out: Tensor, *, weight: float = 1.0, add: bool = False) -> None:
        """Writes `weight * values` to `out`, or adds it."""
        used = self.index[self.mask]
        scaled = values[self.mask] * weight
        out[used] = (out[used].to(torch.float32) + scaled if add else scaled).to(out.dtype)
