"""The kernels of `ds_core.codes` in plain torch: the reference in their tests, and the fallback without native kernels.

Each function performs the same fp32 operations in the same order as its native twin, so that results agree bit by
bit. Blocks of one call are processed as the rows of a matrix, filled up with zeros, some thousand rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_ROWS_AT_ONCE = 1024
_MASK32 = 0xFFFFFFFF


class _Rows:
    """Some blocks as the rows of a matrix."""

    def __init__(self, blocks: Tensor, first: int, device: torch.device) -> None:
        part = blocks.to(device)
        begins, numels = part[:, 0], part[:, 1]
        self.rows = slice(first, first + part.shape[0])
        self.numels = numels
        width = int(numels.max())
        self.width = -(-width // 16) * 16
        lanes = torch.arange(self.width, device=device)
        self.mask = lanes < numels[:, None]
        self.index = begins[:, None] + lanes
        """Index of each element in the tensor; meaningless outside of the mask."""
        self.safe = torch.where(self.mask, self.index, begins[:, None])

    def take(self, x: Tensor) -> Tensor:
        """Returns the rows of `x` in fp32, with zeros outside of the mask."""
        return torch.where(self.mask, x[self.safe].to(torch.float32), 0.0)

    def put(self, out: Tensor, values: Tensor) -> None:
        """Writes the rows of `values` to `out`, rounded to its dtype."""
        out[self.index[self.mask]] = values[self.mask].to(out.dtype)


def _rows(blocks: Tensor, device: torch.device) -> Iterator[_Rows]:
    for first in range(0, blocks.shape[0], _ROWS_AT_ONCE):
        yield _Rows(blocks[first : first + _ROWS_AT_ONCE], first, device)


def _sum_magnitudes(values: Tensor) -> Tensor:
    """Adds |values| of each row in fp64 to 16 accumulators by index modulo 16, then these in one tree."""
    lanes = torch.zeros(values.shape[0], 16, dtype=torch.float64, device=values.device)
    for column in values.abs().to(torch.float64).view(values.shape[0], -1, 16).unbind(1):
        lanes += column
    for half in (8, 4, 2, 1):
        lanes = lanes[:, :half] + lanes[:, half : 2 * half]
    return lanes[:, 0]


def _with_residual(rows: _Rows, x: Tensor, residual: Tensor | None) -> Tensor:
    return rows.take(x) if residual is None else rows.take(x) + rows.take(residual)


def _write(rows: _Rows, out: Tensor, values: Tensor, weight: float, add: bool) -> None:
    scaled = values * torch.tensor(weight, dtype=torch.float32, device=values.device)
    rows.put(out, rows.take(out) + scaled if add else scaled)


@torch.no_grad()
def sign_encode(x: Tensor, blocks: Tensor, scales: Tensor, codes: Tensor, residual: Tensor | None) -> None:
    """See `ds_core.codes.sign_encode`."""
    powers = 2 ** torch.arange(8, device=x.device)
    for rows in _rows(blocks, x.device):
        values = _with_residual(rows, x, residual)
        scale = (_sum_magnitudes(values) / rows.numels).to(torch.float32)
        scales[rows.rows] = scale
        negative = values.signbit() & rows.mask
        packed = (negative.view(values.shape[0], -1, 8) * powers).sum(-1).to(torch.uint8)
        used = rows.mask[:, ::8]
        codes[rows.index[:, ::8][used] // 8] = packed[used]
        if residual is not None:
            rows.put(residual, values - torch.where(values.signbit(), -scale[:, None], scale[:, None]))


@torch.no_grad()
def sign_decode(
    scales: Tensor, codes: Tensor, blocks: Tensor, out: Tensor, *, weight: float, add: bool
) -> None:
    """See `ds_core.codes.sign_decode`."""
    for rows in _rows(blocks, out.device):
        negative = (codes[rows.safe // 8].to(torch.int64) >> (rows.safe % 8)).bitwise_and(1).to(torch.bool)
        scale = scales[rows.rows][:, None]
        _write(rows, out, torch.where(negative, -scale, scale), weight, add)


def _uniform(index: Tensor, begins: Tensor, seed: int) -> Tensor:
    """Returns a random number in [0, 1) for each index, a multiple of 2^-24 ([Note: random numbers by index],
    cpp/src/cpu/codes-inl.h).
    """
    seed &= 0xFFFFFFFFFFFFFFFF
    key = (seed & _MASK32) ^ (((seed >> 32) * 0x85EBCA6B) & _MASK32)
    high = ((begins >> 32) * 0xC2B2AE35).bitwise_and(_MASK32)[:, None]
    word = ((index.bitwise_and(_MASK32) * 0x9E3779B1).bitwise_and(_MASK32) + high + key).bitwise_and(_MASK32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        word = word ^ (word >> shift)
        word = (word * factor).bitwise_and(_MASK32)
    word = word ^ (word >> 16)
    return (word >> 8).to(torch.float32) * 2.0**-24


@torch.no_grad()
def int_encode(
    x: Tensor,
    blocks: Tensor,
    scales: Tensor,
    codes: Tensor,
    residual: Tensor | None,
    *,
    bits: int,
    seed: int | None,
) -> None:
    """See `ds_core.codes.int_encode`."""
    levels = 2 ** (bits - 1) - 1
    smallest = torch.finfo(torch.float32).tiny
    for rows in _rows(blocks, x.device):
        values = _with_residual(rows, x, residual)
        largest = values.abs().amax(1)
        scale = largest / torch.tensor(levels, dtype=torch.float32)
        scale = torch.where(scale < smallest, 0.0, scale)
        scale = torch.where(torch.isfinite(largest), scale, torch.nan)
        inverse = torch.where(scale > 0.0, 1.0 / scale, 0.0)
        scales[rows.rows] = scale
        scaled = values * inverse[:, None]
        if seed is not None:
            scaled = scaled + (_uniform(rows.index, rows.index[:, 0], seed) - 0.5)
        scaled = torch.where(torch.isfinite(scaled), scaled, 0.0)
        code = scaled.round().clamp(-levels, levels)
        if bits == 8:
            rows.put(codes.view(torch.int8), code)
        else:
            nibbles = torch.where(rows.mask, code.to(torch.int32) + 8, 0).view(values.shape[0], -1, 2)
            packed = (nibbles[..., 0] | nibbles[..., 1] << 4).to(torch.uint8)
            used = rows.mask[:, ::2]
            codes[rows.index[:, ::2][used] // 2] = packed[used]
        if residual is not None:
            rows.put(residual, values - code * scale[:, None])


@torch.no_grad()
def int_decode(
    scales: Tensor, codes: Tensor, blocks: Tensor, out: Tensor, *, bits: int, weight: float, add: bool
) -> None:
    """See `ds_core.codes.int_decode`."""
    for rows in _rows(blocks, out.device):
        if bits == 8:
            code = codes.view(torch.int8)[rows.safe].to(torch.float32)
        else:
            nibbles = codes[rows.safe // 2].to(torch.int32) >> (4 * (rows.safe % 2))
            code = (nibbles.bitwise_and(15) - 8).to(torch.float32)
        _write(rows, out, code * scales[rows.rows][:, None], weight, add)
