"""Where the row of every assignment goes, as values: pure functions of the chosen experts.

Legend: T tokens, K choices of each, E experts, n assignments that are kept, R ranks of an expert-parallel group.
Everything has size T K or R E; no tensor has a dimension for tokens and one for experts or capacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_moe.dispatch.values import count_experts, even_sizes, has_values

PADDED_WASTE = 1 << 17
"""Padding rows per expert that cost as much as one more call of a matrix product, times H^2. Measured on a CPU."""


@dataclass(frozen=True)
class Permutation:
    """Rows of tokens in the order of experts."""

    token: Tensor
    """(n,) int64: the token of each row."""
    slot: Tensor
    """(n,) int64: the assignment of each row, token * K + choice."""
    row: Tensor
    """(T, K) int64: the row of each assignment; n where it was dropped."""
    sizes: list[int]
    """(E,): number of rows of each expert."""

    @property
    def num_rows(self) -> int:
        """Number n of rows."""
        return self.token.numel()

    @property
    def drops(self) -> bool:
        """Whether an assignment was dropped."""
        return self.token.numel() < self.row.numel()


def permutation(experts: Tensor, kept: Tensor | None, num_experts: int) -> Permutation:
    """Orders the kept assignments by expert; those of one expert stay in the order of tokens.

    Args:
        experts: (T, K).
        kept: (T, K) bool; None: all.
    """
    k = experts.shape[1]
    flat = experts.reshape(-1)
    if kept is not None:
        flat = torch.where(kept.reshape(-1), flat, num_experts)
    order = torch.argsort(flat, stable=True)
    counts = count_experts(flat, num_experts)
    sizes = counts.tolist()[:num_experts] if has_values(counts) else even_sizes(experts.numel(), num_experts)
    rows = sum(sizes)
    row = torch.empty_like(order)
    row[order] = torch.arange(order.numel(), device=order.device)
    slot = order[:rows]
    return Permutation(slot // k, slot, row.clamp_(max=rows).view_as(experts), sizes)


def segment_index(sizes: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Returns (rows,) int64: for rows in the order (rank, expert), their position in the order (expert, rank).

    Args:
        sizes: R lists of the numbers of rows that each rank sends to each expert of this rank.
    """
    table = torch.tensor(sizes, dtype=torch.int64)
    flat = table.reshape(-1)
    target = (table.T.reshape(-1).cumsum(0) - table.T.reshape(-1)).view(table.T.shape).T.reshape(-1)
    source = flat.cumsum(0) - flat
    shift = torch.repeat_interleave(target - source, flat, output_size=sum(map(sum, sizes)))
    return (shift + torch.arange(shift.numel())).to(device)


@dataclass(frozen=True)
class Layout:
    """How the rows of a rank's experts lie in memory."""

    sizes: list[int]
    """Number of rows of each expert."""
    padded: int = 0
    """Rows that each expert has in memory, the last ones zeros; 0: the rows of experts follow each other."""

    @property
    def num_rows(self) -> int:
        """Number of rows in memory."""
        return self.padded * len(self.sizes) if self.padded else sum(self.sizes)

    def index(self, device: torch.device) -> Tensor | None:
        """Returns (sum of sizes,) int64, the position in memory of each row; None where it is its own number."""
        if not self.padded:
            return None
        sizes = torch.tensor(self.sizes)
        begin = torch.arange(len(self.sizes)) * self.padded - (sizes.cumsum(0) - sizes)
        shift = torch.repeat_interleave(begin, sizes, output_size=sum(self.sizes))
        return (shift + torch.arange(shift.numel())).to(device)


def layout(sizes: list[int], hidden_size: int, device_type: str) -> Layout:
    """Returns the layout in which products are fastest: on a CPU, many small experts of similar sizes are padded to
    the largest, for one batched product instead of a product for each.
    """
    largest, rows = max(sizes), sum(sizes)
    waste = len(sizes) * largest - rows
    if device_type != "cpu" or len(sizes) == 1 or waste * hidden_size**2 > len(sizes) * PADDED_WASTE:
        return Layout(sizes)
    return Layout(sizes, largest)
