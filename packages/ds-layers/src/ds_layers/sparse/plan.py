"""From a layout to groups of block rows that are computed by one call: pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowGroup:
    """Block rows with equally many blocks."""

    heads: Tensor
    """(rows), the head of each row."""
    rows: Tensor
    """(rows), index of the block row."""
    columns: Tensor
    """(rows, blocks of a row), indices of the blocks, in ascending order."""
    diagonal: bool
    """Whether the last block of each row is on the diagonal, and only its lower triangle counts."""


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """The blocks of a layout, for one number of tokens."""

    groups: tuple[RowGroup, ...]
    offsets: Tensor
    """(heads x block rows + 1): where the blocks of each row begin in `columns`, as native kernels take them."""
    columns: Tensor
    """Indices of the blocks of all rows."""
    causal: bool
    """Whether only the lower triangle of blocks on the diagonal counts."""
    block: int
    num_blocks: int
    """Number of blocks that are computed, of all heads together."""
    total_blocks: int

    @property
    def density(self) -> float:
        """Share of the blocks that are computed."""
        return self.num_blocks / self.total_blocks


def plan_blocks(layout: Tensor, block: int, *, causal: bool) -> BlockPlan:
    """Groups the rows of a layout by their number of blocks.

    Args:
        layout: (heads, block rows, block columns), 1 or 0.
        causal: whether later keys are left out.

    Raises:
        ValueError: a row without a block, whose tokens would attend to nothing.
    """
    mask = layout.bool().tril() if causal else layout.bool()
    heads, rows, _ = mask.shape
    counts = mask.sum(-1)
    if not bool(counts.all()):
        head, row = (counts == 0).nonzero()[0].tolist()
        raise ValueError(
            f"block row {row} of head {head} has no blocks, so tokens {row * block} to {(row + 1) * block - 1} would "
            "attend to nothing: add a local window or a global block to the pattern"
        )
    on_diagonal = mask.diagonal(dim1=1, dim2=2) & causal
    kinds = counts * 2 + on_diagonal
    groups = []
    for kind in kinds.unique().tolist():
        which = (kinds == kind).nonzero()
        columns = mask[which[:, 0], which[:, 1]].nonzero()[:, 1].view(len(which), int(kind) // 2)
        groups.append(RowGroup(which[:, 0], which[:, 1], columns, bool(kind % 2)))
    return BlockPlan(
        groups=tuple(groups),
        offsets=torch.cat([counts.new_zeros(1), counts.flatten().cumsum(0)]),
        columns=mask.nonzero()[:, 2].contiguous(),
        causal=causal,
        block=block,
        num_blocks=int(mask.sum()),
        total_blocks=heads * rows * rows,
    )


def token_mask(layout: Tensor, block: int, *, causal: bool) -> Tensor:
    """Returns the layout in tokens: bool, (heads, tokens, tokens), True where a query attends to a key."""
    mask = layout.bool().repeat_interleave(block, 1).repeat_interleave(block, 2)
    return mask.tril() if causal else mask
