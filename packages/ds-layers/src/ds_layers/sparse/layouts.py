"""Patterns of block-sparse attention, with DeepSpeed's parameters.

A layout says which blocks of the attention matrix are computed: (heads, block rows, block columns), 1 or 0. Rows are
queries, columns are keys.

Sources: Child et al., Sparse Transformers (arXiv:1904.10509), for `FixedSparsityConfig`; Zaheer et al., Big Bird
(arXiv:2007.14062); Beltagy et al., Longformer (arXiv:2004.05150).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

UNIDIRECTIONAL, BIDIRECTIONAL = "unidirectional", "bidirectional"


class SparsityConfig:
    """The block size, and which heads share a layout.

    Args:
        num_heads: number of attention heads.
        block: side length of a block, in tokens.
        different_layout_per_head: whether heads have layouts of their own. Otherwise all have that of the first.
    """

    attention = BIDIRECTIONAL

    def __init__(self, num_heads: int, block: int = 16, different_layout_per_head: bool = False) -> None:
        if num_heads < 1 or block < 1:
            raise ValueError(f"num_heads {num_heads} and block {block} must be at least 1")
        self.num_heads = num_heads
        self.block = block
        self.different_layout_per_head = different_layout_per_head

    def make_layout(self, seq_len: int) -> Tensor:
        """Returns the layout for a number of tokens: int64, (heads, seq_len / block, seq_len / block).

        Raises:
            ValueError: `seq_len` is not a multiple of the block size, or has fewer blocks than the pattern needs.
        """
        if seq_len % self.block:
            raise ValueError(
                f"{seq_len} tokens are not a multiple of the block size {self.block}: pad them "
                "(SparseAttentionUtils.pad_to_block_size)"
            )
        blocks = seq_len // self.block
        layout = torch.zeros(self.num_heads, blocks, blocks, dtype=torch.int64)
        for head in range(self.num_heads if self.different_layout_per_head else 1):
            self._fill(layout[head], head)
        if not self.different_layout_per_head:
            layout[1:] = layout[0]
        return layout.tril_() if self.attention == UNIDIRECTIONAL else layout

    def _fill(self, layout: Tensor, head: int) -> None:
        """Sets the blocks of one head. Blocks of later keys are removed afterwards in unidirectional attention."""
        raise NotImplementedError(f"{type(self).__name__} has no pattern: use one of its subclasses")

    def _check_attention(self, attention: str, horizontal: bool = False) -> None:
        if attention not in (UNIDIRECTIONAL, BIDIRECTIONAL):
            raise ValueError(f"attention {attention!r}: it must be {UNIDIRECTIONAL!r} or {BIDIRECTIONAL!r}")
        if horizontal and attention != BIDIRECTIONAL:
            raise ValueError(
                "horizontal_global_attention lets global blocks attend to all tokens: it needs bidirectional attention"
            )
        self.attention = attention


class DenseSparsityConfig(SparsityConfig):
    """All blocks, for comparison."""

    def _fill(self, layout: Tensor, head: int) -> None:
        layout.fill_(1)


class FixedSparsityConfig(SparsityConfig):
    """Windows of consecutive blocks, and the last blocks of each window for all tokens.

    Args:
        num_local_blocks: number of blocks of a window.
        num_global_blocks: number of global blocks of a window, a divisor of `num_local_blocks`.
        attention: "unidirectional" or "bidirectional".
        horizontal_global_attention: whether global blocks attend to all tokens, too.
        num_different_global_patterns: number of heads that have different global blocks: the last ones of a window, the
            ones before, ...
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_local_blocks: int = 4,
        num_global_blocks: int = 1,
        attention: str = BIDIRECTIONAL,
        horizontal_global_attention: bool = False,
        num_different_global_patterns: int = 1,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        self._check_attention(attention, horizontal_global_attention)
        if num_global_blocks < 1 or num_local_blocks % num_global_blocks:
            raise ValueError(
                f"num_local_blocks {num_local_blocks} is not a multiple of num_global_blocks {num_global_blocks}"
            )
        if num_different_global_patterns > 1 and not different_layout_per_head:
            raise ValueError(
                f"num_different_global_patterns {num_different_global_patterns} needs different_layout_per_head"
            )
        most = num_local_blocks // num_global_blocks
        if not 1 <= num_different_global_patterns <= most:
            raise ValueError(
                f"num_different_global_patterns {num_different_global_patterns}: a window has {most} places for "
                f"{num_global_blocks} global blocks"
            )
        self.num_local_blocks, self.num_global_blocks = num_local_blocks, num_global_blocks
        self.horizontal_global_attention = horizontal_global_attention
        self.num_different_global_patterns = num_different_global_patterns

    def _fill(self, layout: Tensor, head: int) -> None:
        blocks = len(layout)
        first = (
            self.num_local_blocks - (1 + head % self.num_different_global_patterns) * self.num_global_blocks
        )
        for begin in range(0, blocks, self.num_local_blocks):
            end = min(begin + self.num_local_blocks, blocks)
            layout[begin:end, begin:end] = 1
            # The last window may be shorter: its global blocks are then the last ones that it has.
            at = max(0, min(begin + first, blocks - self.num_global_blocks))
            layout[:, at : at + self.num_global_blocks] = 1
            if self.horizontal_global_attention:
                layout[at : at + self.num_global_blocks] = 1


class VariableSparsityConfig(SparsityConfig):
    """Windows of different sizes, chosen global blocks, and random blocks.

    Args:
        num_random_blocks: number of random blocks in each row.
        local_window_blocks: numbers of blocks of the first windows; the last number holds for all others.
        global_block_indices: the global blocks, or the begins of ranges of them.
        global_block_end_indices: the ends of these ranges. Default: each range is one block.
        attention: "unidirectional" or "bidirectional".
        horizontal_global_attention: whether global blocks attend to all tokens, too.
        seed: of the random blocks, which are the same on every rank.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_random_blocks: int = 0,
        local_window_blocks: Sequence[int] = (4,),
        global_block_indices: Sequence[int] = (0,),
        global_block_end_indices: Sequence[int] | None = None,
        attention: str = BIDIRECTIONAL,
        horizontal_global_attention: bool = False,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        self._check_attention(attention, horizontal_global_attention)
        if not local_window_blocks or min(local_window_blocks) < 1:
            raise ValueError(f"local_window_blocks {list(local_window_blocks)}: give sizes of at least 1")
        self.num_random_blocks, self.local_window_blocks = num_random_blocks, list(local_window_blocks)
        self.global_block_indices, self.global_block_end_indices = (
            global_block_indices,
            global_block_end_indices,
        )
        self.horizontal_global_attention = horizontal_global_attention
        self.seed = seed
        self._globals = _ranges(global_block_indices, global_block_end_indices)

    def _fill(self, layout: Tensor, head: int) -> None:
        begin, sizes = 0, iter(self.local_window_blocks)
        size = 0
        while begin < len(layout):
            size = next(sizes, size)
            layout[begin : begin + size, begin : begin + size] = 1
            begin += size
        _fill_globals(layout, self._globals, rows=self.horizontal_global_attention)
        _fill_random(
            layout, self.num_random_blocks, (self.seed, head), causal=self.attention == UNIDIRECTIONAL
        )


class BigBirdSparsityConfig(SparsityConfig):
    """A sliding window, global blocks at the beginning, and random blocks.

    Args:
        num_random_blocks: number of random blocks in each row.
        num_sliding_window_blocks: width of the window; half of it before, and half of it after a block.
        num_global_blocks: number of blocks at the beginning that attend to all, and to which all attend.
        attention: "unidirectional" or "bidirectional".
        seed: of the random blocks, which are the same on every rank.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_random_blocks: int = 1,
        num_sliding_window_blocks: int = 3,
        num_global_blocks: int = 1,
        attention: str = BIDIRECTIONAL,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        self._check_attention(attention)
        self.num_random_blocks, self.num_sliding_window_blocks = num_random_blocks, num_sliding_window_blocks
        self.num_global_blocks = num_global_blocks
        self.seed = seed

    def _fill(self, layout: Tensor, head: int) -> None:
        _check_fits("num_sliding_window_blocks", self.num_sliding_window_blocks, len(layout))
        _check_fits("num_global_blocks", self.num_global_blocks, len(layout))
        _fill_window(layout, self.num_sliding_window_blocks)
        _fill_globals(layout, [(0, self.num_global_blocks)], rows=True)
        _fill_random(
            layout, self.num_random_blocks, (self.seed, head), causal=self.attention == UNIDIRECTIONAL
        )


class BSLongformerSparsityConfig(SparsityConfig):
    """A sliding window, and chosen global blocks that attend to all, and to which all attend.

    Args:
        num_sliding_window_blocks: width of the window; half of it before, and half of it after a block.
        global_block_indices: the global blocks, or the begins of ranges of them.
        global_block_end_indices: the ends of these ranges. Default: each range is one block.
        attention: "unidirectional" or "bidirectional".
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_sliding_window_blocks: int = 3,
        global_block_indices: Sequence[int] = (0,),
        global_block_end_indices: Sequence[int] | None = None,
        attention: str = BIDIRECTIONAL,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        self._check_attention(attention)
        self.num_sliding_window_blocks = num_sliding_window_blocks
        self.global_block_indices, self.global_block_end_indices = (
            global_block_indices,
            global_block_end_indices,
        )
        self._globals = _ranges(global_block_indices, global_block_end_indices)

    def _fill(self, layout: Tensor, head: int) -> None:
        _check_fits("num_sliding_window_blocks", self.num_sliding_window_blocks, len(layout))
        _fill_window(layout, self.num_sliding_window_blocks)
        _fill_globals(layout, self._globals, rows=True)


class LocalSlidingWindowSparsityConfig(SparsityConfig):
    """A sliding window; no head has a layout of its own.

    Args:
        num_sliding_window_blocks: width of the window; half of it before, and half of it after a block.
        attention: "unidirectional" or "bidirectional".
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        num_sliding_window_blocks: int = 3,
        attention: str = UNIDIRECTIONAL,
    ) -> None:
        super().__init__(num_heads, block)
        self._check_attention(attention)
        self.num_sliding_window_blocks = num_sliding_window_blocks

    def _fill(self, layout: Tensor, head: int) -> None:
        _check_fits("num_sliding_window_blocks", self.num_sliding_window_blocks, len(layout))
        _fill_window(layout, self.num_sliding_window_blocks)


def _check_fits(name: str, count: int, blocks: int) -> None:
    if count > blocks:
        raise ValueError(f"{name} {count} is more than the {blocks} blocks of the sequence")


def _ranges(begins: Sequence[int], ends: Sequence[int] | None) -> list[tuple[int, int]]:
    """Returns half-open ranges.

    Raises:
        ValueError: another number of ends than of begins, or a range without blocks.
    """
    if ends is None:
        return [(begin, begin + 1) for begin in begins]
    if len(ends) != len(begins):
        raise ValueError(
            f"{len(begins)} global_block_indices and {len(ends)} global_block_end_indices: give as many"
        )
    ranges = list(zip(begins, ends, strict=True))
    for begin, end in ranges:
        if begin >= end:
            raise ValueError(
                f"a range of global blocks begins at {begin} and ends at {end}: it has no blocks"
            )
    return ranges


def _fill_window(layout: Tensor, width: int) -> None:
    half = width // 2
    for row in range(len(layout)):
        layout[row, max(0, row - half) : row + half + 1] = 1


def _fill_globals(layout: Tensor, ranges: Sequence[tuple[int, int]], *, rows: bool) -> None:
    for begin, end in ranges:  # those outside of a shorter sequence do not exist
        layout[:, begin:end] = 1
        if rows:
            layout[begin:end] = 1


def _fill_random(layout: Tensor, count: int, seed: tuple[int, int], *, causal: bool) -> None:
    if not count:
        return
    _check_fits("num_random_blocks", count, len(layout))
    for row, generator in zip(range(len(layout)), _generators(seed), strict=False):
        columns = range(row + 1 if causal else len(layout))
        layout[row, generator.sample(columns, min(count, len(columns)))] = 1


def _generators(seed: tuple[int, int]) -> Iterator[random.Random]:
    generator = random.Random(f"{seed[0]}/{seed[1]}")
    while True:
        yield generator
