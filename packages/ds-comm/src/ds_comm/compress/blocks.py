"""How tensors lie in one buffer, and how the buffer is cut into blocks with a scale each: pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 64
"""Tensors start at multiples of this many elements, so that their signs start at a byte, and fp32 at a cache line."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The blocks of a 1-D buffer, in ascending order. No block has elements of two tensors."""

    table: Tensor
    """int64, one row per block: its first element and its number of elements. On the CPU or on the buffer's device."""
    numel: int
    """Size of the buffer, including the gaps between tensors."""

    @staticmethod
    def uniform(numel: int, block_numel: int) -> Blocks:
        """Cuts one tensor into blocks of `block_numel` elements; the last one may be shorter."""
        return Blocks.of([numel], block_numel)[0]

    @staticmethod
    def of(numels: Sequence[int], block_numel: int) -> tuple[Blocks, list[int]]:
        """Places tensors one behind the other, and cuts each into blocks.

        Returns:
            The blocks, and the first element of each tensor in the buffer.
        """
        if block_numel < 1:
            raise ValueError(f"block_numel must be positive, but is {block_numel}")
        offsets, rows, end = [], [], 0
        for numel in numels:
            offsets.append(end)
            begins = torch.arange(0, numel, block_numel, dtype=torch.int64)
            rows.append(torch.stack([begins + end, (numel - begins).clamp(max=block_numel)], 1))
            end += -(-numel // ALIGNMENT) * ALIGNMENT
        table = torch.cat(rows) if rows else torch.zeros(0, 2, dtype=torch.int64)
        return Blocks(table=table, numel=end), offsets

    def __len__(self) -> int:
        return int(self.table.shape[0])

    def to(self, device: torch.device) -> Blocks:
        """Returns the same blocks with the table on `device`."""
        return self if self.table.device == device else Blocks(table=self.table.to(device), numel=self.numel)

    def cut(self, parts: int) -> list[tuple[int, Blocks]]:
        """Cuts the buffer between blocks into `parts` consecutive parts of nearly equal size.

        Returns:
            The first element of each part in this buffer, and the blocks of each part, counted from there.
        """
        begins = self.table[:, 0].cpu().contiguous()
        targets = torch.tensor([self.numel * part // parts for part in range(1, parts)], dtype=torch.int64)
        rows = [0, *torch.searchsorted(begins, targets).tolist(), len(self)]
        starts = [int(begins[row]) if row < len(self) else self.numel for row in rows]
        starts[0] = 0
        cut = []
        for part in range(parts):
            table = self.table[rows[part] : rows[part + 1]].clone()
            table[:, 0] -= starts[part]
            cut.append((starts[part], Blocks(table=table, numel=starts[part + 1] - starts[part])))
        return cut
