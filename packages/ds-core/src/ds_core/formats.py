"""Formats of parameters and optimizer states other than fp32, as conversions in plain torch: the reference of the
kernels' conversions, and what reads such states.

Definitions: `cpp/include/ds/formats.h`.

**8-bit moments** of Adam take one byte each. Blocks of 32 elements, counted from the start of the tensor, share an
exponent, which is stored within the block. A tensor that is cut at a multiple of 32 elements has the same blocks.
With V the largest `exp_avg_sq` of the block, bounds of what one rounding adds:

* `exp_avg_sq`, from 2^-30 V on: less than 1/8 of the value, therefore 1/15 of its root. Smaller values become at most
  9/8 2^-30 V, and 0 only in a block of zeros.
* `exp_avg`, from 2^-11 sqrt(V) to 8 sqrt(V): less than 1/8 of the value, and 1/4 for the first 8 elements of a block.
  Smaller ones: less than 2^-11 sqrt(V). Larger ones, which beta1 = 0.9 and beta2 = 0.999 exclude, become 8 sqrt(V) or
  more.
* The last elements of a tensor, if they are fewer than 8, have no block: less than 1/2 of the value, for `exp_avg`
  from 2^-56 to 2^8, for `exp_avg_sq` from 2^-112 to 2^16.

Rounding is stochastic: within these ranges the expectation is the exact value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOMENT_BLOCK_NUMEL = 32
"""Elements that share an exponent; cut tensors at multiples of it."""

_WORD = 0xFFFFFFFF
_REST = 0x7FFFFFFF
_INF = 0x7F800000


@dataclass(frozen=True, kw_only=True)
class StepFormats:
    """How one call of an optimizer kernel reads and writes what is not fp32."""

    master_bits: Sequence[Tensor | None] | None = None
    """int16, one per parameter: the lower half of the fp32 master of a bf16 parameter; None: it has no master."""
    rounding: int | None = None
    """Key of stochastic rounding, 64 bits, which must differ from step to step; None: bf16 states are rounded to
    nearest even. 8-bit states need a key."""
    copies_away: bool = False
    """Whether bf16 copies of fp32 parameters round ties away from zero, as split masters do."""

    def key(self, state: int) -> int:
        """The key of one state: of 32 bits."""
        assert self.rounding is not None
        return self.rounding >> 32 * state & _WORD


def native_formats(
    formats: StepFormats | None,
) -> tuple[Sequence[Tensor | None] | None, int | None, bool] | None:
    """The argument of the native kernels."""
    return None if formats is None else (formats.master_bits, formats.rounding, formats.copies_away)


def master_bits(formats: StepFormats | None) -> Sequence[Tensor | None] | None:
    """The master bits, if any."""
    return None if formats is None else formats.master_bits


def rounding_key(seed: int, step: int) -> int:
    """Returns the key of a step: SplitMix64 (Steele et al. 2014) of seed and step."""
    mask = (1 << 64) - 1
    x = (seed * 0xD1342543DE82EF95 + step * 0x9E3779B97F4A7C15) & mask
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31


def _bits(x: Tensor) -> Tensor:
    """The bits of fp32 numbers, as int64 from 0 to 2^32 - 1."""
    return x.to(torch.float32).contiguous().view(torch.int32).to(torch.int64) & _WORD


def _floats(bits: Tensor) -> Tensor:
    signed = torch.where(bits > _REST, bits - (1 << 32), bits)
    return signed.to(torch.int32).view(torch.float32)


def _shorts(bits: Tensor) -> Tensor:
    low = bits & 0xFFFF
    return torch.where(low > 0x7FFF, low - 0x10000, low).to(torch.int16)


def _rounded_away(x: Tensor) -> Tensor:
    """The bits of x; a NaN becomes the quiet NaN of its sign."""
    bits = _bits(x)
    return torch.where((bits & _REST) > _INF, bits & 0x80000000 | 0x7FC00000, bits)


def round_away(x: Tensor) -> Tensor:
    """fp32 to bf16, to nearest, ties away from zero."""
    return _shorts((_rounded_away(x) + 0x8000) >> 16).view(torch.bfloat16)


def split_master(x: Tensor) -> tuple[Tensor, Tensor]:
    """Splits fp32 numbers into bf16 parameters (`round_away`) and 16 more bits, int16: `join_master` gives them back,
    bit for bit except for the payload of NaN.
    """
    bits = _rounded_away(x)
    return _shorts((bits + 0x8000) >> 16).view(torch.bfloat16), _shorts(bits)


def join_master(param: Tensor, master_bits: Tensor) -> Tensor:
    """Returns the fp32 master of a bf16 parameter and its master bits."""
    high = param.detach().contiguous().view(torch.int16).to(torch.int64) << 16
    return _floats((high + master_bits.to(torch.int64)) & _WORD)


def round_stochastically(x: Tensor, key: int) -> Tensor:
    """fp32 to bf16, to one of the two neighbours, with a probability proportional to the distance from the other."""
    bits = _bits(x)
    random = (bits + key) * 0x9E3779B1 & _WORD
    random = (random ^ random >> 15) * 0x85EBCA77 & _WORD
    is_nan = (bits & _REST) > _INF
    rounded = (bits + torch.where((bits & _REST) < _INF, random >> 16, 0)) >> 16
    return _shorts(torch.where(is_nan, bits >> 16 | 0x40, rounded)).view(torch.bfloat16)


# --- 8-bit moments

_ALONE_M = (127 - 56) << 23
_ALONE_V = (127 - 112) << 23
_LOW_BITS = 0x0101010101010101


def _divided(numel: int) -> tuple[int, int]:
    """Returns how many blocks there are, the last of which may be short, and how many elements are in none."""
    rest = numel % MOMENT_BLOCK_NUMEL
    return numel // MOMENT_BLOCK_NUMEL + (rest >= 8), rest if rest < 8 else 0


def _in_blocks(x: Tensor, blocks: int) -> Tensor:
    padded = x.new_zeros(blocks * MOMENT_BLOCK_NUMEL)
    padded[: min(x.numel(), padded.numel())] = x[: padded.numel()]
    return padded.view(blocks, MOMENT_BLOCK_NUMEL)


def _code_mask(device: torch.device) -> Tensor:
    mask = torch.full((MOMENT_BLOCK_NUMEL,), 0x7F, dtype=torch.int64, device=device)
    mask[:8] = 0x7E
    return mask


def _smallest(exponent: Tensor) -> tuple[Tensor, Tensor]:
    """The bits below the smallest codes of `exp_avg` and `exp_avg_sq`."""
    return ((exponent + 129) // 2 - 13) << 23, (exponent - 31) << 23


def unpack_moments(exp_avg: Tensor, exp_avg_sq: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both moments in fp32, of the same shape.

    Args:
        exp_avg, exp_avg_sq: uint8, contiguous; a whole tensor, or one that begins at a multiple of 32 elements.
    """
    shape, numel = exp_avg.shape, exp_avg.numel()
    m8, v8 = exp_avg.reshape(-1).to(torch.int64), exp_avg_sq.reshape(-1).to(torch.int64)
    blocks, alone = _divided(numel)
    codes, codes_v = _in_blocks(m8[: numel - alone], blocks), _in_blocks(v8[: numel - alone], blocks)
    lanes = torch.arange(8, device=m8.device)
    exponent = ((codes[:, :8] & 1) << lanes).sum(1, keepdim=True)
    low_m, low_v = _smallest(exponent)
    code = codes & _code_mask(m8.device)
    bits = torch.where(code != 0, (code << 20) + low_m, 0) & _REST | (codes & 0x80) << 24
    bits_v = (codes_v << 20) + low_v
    zero, lost = exponent == 0, exponent == 255
    bits, bits_v = (torch.where(lost, 0x7FC00000, torch.where(zero, 0, b)).view(-1)[: numel - alone]
                    for b in (bits, bits_v))  # fmt: skip
    if alone:
        m8, v8 = m8[-alone:], v8[-alone:]
        code = m8 & 0x7F
        own = torch.where(code != 0, (code << 22) + _ALONE_M, 0) | (m8 & 0x80) << 24
        own_v = torch.where(v8 != 0, (v8 << 22) + _ALONE_V, 0)
        bits = torch.cat([bits, torch.where(v8 == 255, 0x7FC00000, own)])
        bits_v = torch.cat([bits_v, torch.where(v8 == 255, 0x7FC00000, own_v)])
    return _floats(bits).view(shape), _floats(bits_v).view(shape)


def _random(bits: Tensor, bits_v: Tensor, key: int) -> Tensor:
    return ((bits ^ key) + bits_v) * 0x9E3779B1 & _WORD


def pack_moments(exp_avg: Tensor, exp_avg_sq: Tensor, key: int) -> tuple[Tensor, Tensor]:
    """The inverse of `unpack_moments`, with stochastic rounding; `exp_avg_sq` must not be negative."""
    shape, numel = exp_avg.shape, exp_avg.numel()
    bits, bits_v = _bits(exp_avg.reshape(-1)), _bits(exp_avg_sq.reshape(-1))
    blocks, alone = _divided(numel)
    covered = numel - alone
    m8, v8 = _pack_blocks(_in_blocks(bits[:covered], blocks), _in_blocks(bits_v[:covered], blocks), key)
    own_m, own_v = _pack_alone(bits[covered:], bits_v[covered:], key)
    return torch.cat([m8[:covered], own_m]).view(shape), torch.cat([v8[:covered], own_v]).view(shape)


def _pack_blocks(bits: Tensor, bits_v: Tensor, key: int) -> tuple[Tensor, Tensor]:
    largest = bits_v.amax(1, keepdim=True)
    exponent = ((largest + 0xFFFFF) >> 23).clamp_min(32)
    low_m, low_v = _smallest(exponent)
    random = _random(bits, bits_v, key)
    mask = _code_mask(bits.device)
    below = random >> 11 & (0xFFFFF | (mask ^ 0x7F) << 20)
    code = (((bits & _REST) - low_m + below) >> 20).clamp(0, 127) & mask | bits >> 24 & 0x80
    code[:, :8] |= exponent >> torch.arange(8, device=bits.device) & 1
    code_v = ((bits_v - low_v + (random >> 12)) >> 20).clamp(0, 255)
    kept = torch.where(largest == 0, 0, torch.where(exponent >= 255, 255, -1))
    m8, v8 = (torch.where(kept < 0, c, kept).to(torch.uint8).view(-1) for c in (code, code_v))
    return m8, v8


def _pack_alone(bits: Tensor, bits_v: Tensor, key: int) -> tuple[Tensor, Tensor]:
    size, random = bits & _REST, _random(bits, bits_v, key) >> 10
    code = ((size - _ALONE_M + random) >> 22).clamp(0, 127) | bits >> 24 & 0x80
    code_v = ((bits_v - _ALONE_V + random) >> 22).clamp(1, 254)
    code_v = torch.where(bits_v != 0, code_v, 0)
    lost = (size >= _INF) | (bits_v >= _INF)
    return torch.where(lost, 255, code).to(torch.uint8), torch.where(lost, 255, code_v).to(torch.uint8)


# --- the reference of a step in other formats


@contextmanager
def widened(
    params: Sequence[Tensor],
    states: Sequence[Sequence[Tensor] | None],
    out: Sequence[Tensor | None] | None,
    formats: StepFormats | None,
) -> Iterator[tuple[Sequence[Tensor], Any, Sequence[Tensor | None] | None]]:
    """Context manager that provides parameters, states and copies for a step of `ds_core.reference`: what is not fp32
    is widened, and its new values are stored when the context is left.
    """
    formats = formats if formats is not None else StepFormats()
    count = len(params)
    low = formats.master_bits if formats.master_bits is not None else [None] * count
    copies = list(out) if out is not None else [None] * count
    wide = [
        p if p.dtype == torch.float32 else p.float() if bits is None else join_master(p, bits)
        for p, bits in zip(params, low, strict=True)
    ]
    own = [
        None if list_ is None else [_widened(formats, list_, i, states) for i in range(count)]
        for list_ in states
    ]
    late = [p.dtype != torch.float32 or formats.copies_away for p in params]
    yield wide, own, [None if after else copy for after, copy in zip(late, copies, strict=True)]
    for i, (param, bits, copy) in enumerate(zip(params, low, copies, strict=True)):
        if bits is not None:
            high, rest = split_master(wide[i])
            param.copy_(high)
            bits.copy_(rest)
        elif wide[i] is not param:
            param.copy_(wide[i])
        if copy is not None and late[i]:
            away = param.dtype == torch.float32 and copy.dtype == torch.bfloat16
            copy.copy_(round_away(param) if away else param)
        _store(formats, i, states, own)


def _is_packed(states: Sequence[Sequence[Tensor] | None], i: int) -> bool:
    return len(states) == 2 and states[0] is not None and states[0][i].dtype == torch.uint8


def _widened(
    formats: StepFormats, own: Sequence[Tensor], i: int, states: Sequence[Sequence[Tensor] | None]
) -> Tensor:
    if _is_packed(states, i):
        assert states[0] is not None and states[1] is not None
        both = unpack_moments(states[0][i], states[1][i])
        return both[0] if own is states[0] else both[1]
    stochastic = own[i].dtype == torch.bfloat16 and formats.rounding is not None
    return own[i].float() if stochastic else own[i]


def _store(
    formats: StepFormats,
    i: int,
    states: Sequence[Sequence[Tensor] | None],
    new: Sequence[Sequence[Tensor] | None],
) -> None:
    if _is_packed(states, i):
        assert states[0] is not None and states[1] is not None and new[0] is not None and new[1] is not None
        if formats.rounding is None:
            raise ValueError("8-bit states are rounded stochastically; pass formats with a key")
        m8, v8 = pack_moments(new[0][i], new[1][i], formats.key(0))
        states[0][i].copy_(m8)
        states[1][i].copy_(v8)
        return
    for number, (stored, values) in enumerate(zip(states, new, strict=True)):
        if stored is not None and values is not None and values[i] is not stored[i]:
            stored[i].copy_(round_stochastically(values[i], formats.key(number)))
