"""Divides optimizer states into pages: a pure function of sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGNMENT = 64
"""Each state begins at a multiple of this many bytes, as the kernels prefer."""


@dataclass(frozen=True)
class Part:
    """A range of elements of one parameter, and where its states are in a page."""

    param: int
    """Index of the parameter."""
    start: int
    numel: int
    offsets: Mapping[str, tuple[int, torch.dtype]]
    """Name of each state -> (first byte in the page, dtype)."""

    def state(self, page: Tensor, name: str) -> Tensor:
        """Returns the view of one state in the bytes of a page."""
        begin, dtype = self.offsets[name]
        return page[begin : begin + self.numel * dtype.itemsize].view(dtype)


@dataclass(frozen=True)
class Page:
    """States that are loaded and stored together."""

    parts: Sequence[Part]
    num_bytes: int


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _needed(numel: int, dtypes: Mapping[str, torch.dtype]) -> int:
    return sum(_aligned(numel * dtype.itemsize) for dtype in dtypes.values())


@dataclass(frozen=True)
class Sized:
    """What is known of one parameter before its states have places."""

    param: int
    """Index of the parameter."""
    numel: int
    dtypes: Mapping[str, torch.dtype]
    """Name of each state -> dtype."""
    whole: bool = False
    """Whether all its states must be in one page."""


def divide(params: Sequence[Sized], page_bytes: int) -> list[Page]:
    """Fills one page after the other, in the order of the parameters. A parameter that does not fit into the rest of a
    page continues in the next one; if it must be whole, it begins a new page, which may be larger than others.

    Args:
        params: parameters without elements or states are left out.
        page_bytes: the maximum size of a page, except for a parameter that must be whole.
    """
    pages: list[Page] = []
    parts: list[Part] = []
    used = 0

    def close() -> None:
        nonlocal parts, used
        if parts:
            pages.append(Page(tuple(parts), used))
        parts, used = [], 0

    for sized in params:
        start, numel, dtypes = 0, sized.numel, sized.dtypes
        while dtypes and start < numel:
            if sized.whole:
                if parts and used + _needed(numel, dtypes) > page_bytes:
                    close()
                fits = numel
            else:
                fits = _fitting(page_bytes - used, dtypes)
            if fits == 0:
                if not parts:
                    raise ValueError(
                        f"page_bytes={page_bytes}: a page must hold at least 1024 elements, "
                        f"{_needed(1024, dtypes)} bytes"
                    )
                close()
                continue
            count = min(fits, numel - start)
            offsets: dict[str, tuple[int, torch.dtype]] = {}
            for name, dtype in dtypes.items():
                offsets[name] = (used, dtype)
                used += _aligned(count * dtype.itemsize)
            parts.append(Part(sized.param, start, count, offsets))
            start += count
    close()
    return pages


def _fitting(num_bytes: int, dtypes: Mapping[str, torch.dtype]) -> int:
    """Returns how many elements fit: a multiple of 1024, so that a part begins at an aligned element."""
    each = sum(dtype.itemsize for dtype in dtypes.values())
    return num_bytes // each // 1024 * 1024
