"""Which tokens of a sequence each rank has: pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Order = Literal["contiguous", "zigzag"]
"""How tokens are divided. "contiguous": rank r has the r-th part. "zigzag": the sequence has 2 P parts, and rank r has
parts r and 2 P - 1 - r, so that causal attention is the same amount of work on every rank of a ring."""


@dataclass(frozen=True, kw_only=True)
class SequenceLayout:
    """The division of sequences among sequence-parallel ranks."""

    size: int
    """Number of ranks."""
    ring: int = 1
    """Number of ranks of a ring, a divisor of `size`; the others are divided by Ulysses within each place of the ring:
    rank = place in the ring x (size / ring) + index within the place. 1: no ring."""
    order: Order = "contiguous"
    """The order of the parts in the ring."""

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that do not divide each other, or an unknown order."""
        if self.size < 1 or self.ring < 1 or self.size % self.ring:
            raise ValueError(f"{self.ring} ranks of a ring do not divide {self.size} sequence-parallel ranks")
        if self.order not in ("contiguous", "zigzag"):
            raise ValueError(f"order={self.order!r}: it must be 'contiguous' or 'zigzag'")

    @property
    def multiple(self) -> int:
        """A number of tokens that all parts of a sequence divide."""
        return self.size * (2 if self.order == "zigzag" and self.ring > 1 else 1)

    def padded(self, tokens: int) -> int:
        """Returns the smallest number of tokens, at least `tokens`, that can be divided."""
        return -(-tokens // self.multiple) * self.multiple

    def ranges(self, rank: int, tokens: int) -> tuple[tuple[int, int], ...]:
        """Returns the half-open ranges of tokens of a rank, in the order in which it has them.

        Raises:
            ValueError: `tokens` is not a multiple of `multiple`.
        """
        if tokens % self.multiple:
            raise ValueError(
                f"{tokens} tokens cannot be divided among {self.size} ranks: pad them to {self.padded(tokens)}"
            )
        within = self.size // self.ring
        place, index = divmod(rank, within)
        if self.order == "contiguous" or self.ring == 1:
            length = tokens // self.size
            return ((rank * length, (rank + 1) * length),)
        part = tokens // (2 * self.ring)
        begin, end = index * 2 * part // within, (index + 1) * 2 * part // within
        segments, ranges = (place, 2 * self.ring - 1 - place), []
        for i, segment in enumerate(segments):
            low, high = max(begin, i * part), min(end, (i + 1) * part)
            if high > low:
                ranges.append((segment * part + low - i * part, segment * part + high - i * part))
        return tuple(ranges)
