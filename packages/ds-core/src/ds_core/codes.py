"""Kernels that encode floating-point tensors in 1, 4 or 8 bits an element, and decode them.

A tensor is encoded in blocks, each with a scale of its own. `blocks` is an int64 tensor of shape (number of blocks, 2):
the first element of a block, a multiple of 8, and its number of elements, at most `MAX_BLOCK_NUMEL`. Blocks must not
overlap (the first element of the next block lies at least at the end of this one, rounded up to a multiple of 8);
elements outside of all blocks are neither read nor written. So one call encodes many tensors that lie in one buffer,
and no block has elements of two tensors.

With `residual` (fp32 or bf16, of the size of `x`), the kernels encode `x + residual` and leave in `residual` what was
lost: error feedback (Seide et al. 2014, section 3; docs/notes/onebit.md). All kernels make one pass over memory.

Element i is at bit `i % 8` of byte `i / 8` of signs, at nibble `i % 2` of byte `i / 2` of 4-bit codes, at byte i of
8-bit codes. Results do not depend on the device, the CPU target, or the number of threads; `ds_core.codes_reference`
computes the same bits with torch. On a GPU `blocks` is not checked, because reading it would wait for the device.
"""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import increment_version

from ds_core import _gpu, _native, codes_reference, threads

MAX_BLOCK_NUMEL = 4096
"""Largest number of elements of a block."""


def sign_encode(
    x: Tensor, blocks: Tensor, scales: Tensor, codes: Tensor, residual: Tensor | None = None
) -> None:
    """Encodes each element as its sign bit (1 for negative), each block with the mean of its magnitudes.

    This scale minimises the squared error, so that a block never loses more than its norm (Karimireddy et al. 2019,
    definition of compressed signs). The mean is summed in fp64 in a fixed order. A block with an element that is not
    finite gets a scale that is not finite.

    Args:
        x: 1-D fp32, bf16 or fp16.
        blocks: see the module.
        scales: fp32, one element per block.
        codes: uint8, at least ceil(x.numel() / 8) bytes. Bits of elements outside of all blocks are undefined.
        residual: see the module.
    """
    if not _gpu.takes(x):
        codes_reference.sign_encode(x, blocks, scales, codes, residual)
        return
    _native.core.sign_encode(x, residual, blocks.to(x.device), scales, codes, threads.count())
    increment_version([t for t in (scales, codes, residual) if t is not None])


def sign_decode(
    scales: Tensor, codes: Tensor, blocks: Tensor, out: Tensor, *, weight: float = 1.0, add: bool = False
) -> None:
    """Writes `weight * scale` with the sign of each element to `out` (1-D fp32, bf16, fp16), or adds it."""
    if not _gpu.takes(out):
        codes_reference.sign_decode(scales, codes, blocks, out, weight=weight, add=add)
        return
    _native.core.sign_decode(scales, codes, blocks.to(out.device), out, weight, add, threads.count())
    increment_version([out])


def int_encode(
    x: Tensor,
    blocks: Tensor,
    scales: Tensor,
    codes: Tensor,
    residual: Tensor | None = None,
    *,
    bits: int,
    seed: int | None = None,
) -> None:
    """Encodes each element as a signed integer of `bits` bits, each block with the scale max |x| / (2^(bits - 1) - 1).

    4-bit codes are stored with 8 added. A block with an element that is not finite gets the scale NaN.

    Args:
        x: 1-D fp32, bf16 or fp16.
        blocks: see the module.
        scales: fp32, one element per block.
        codes: uint8, at least ceil(x.numel() * bits / 8) bytes.
        residual: see the module.
        bits: 4 or 8.
        seed: None rounds to nearest. A number rounds up or down at random, with the right mean; the random number of
            an element is a function of the seed and of the element's index alone.
    """
    if bits not in (4, 8):
        raise ValueError(f"int_encode: bits must be 4 or 8, but is {bits}")
    if not _gpu.takes(x):
        codes_reference.int_encode(x, blocks, scales, codes, residual, bits=bits, seed=seed)
        return
    stochastic = seed is not None
    number = (seed or 0) & 0xFFFFFFFFFFFFFFFF
    _native.core.int_encode(
        x, residual, blocks.to(x.device), scales, codes, bits, stochastic, number, threads.count()
    )
    increment_version([t for t in (scales, codes, residual) if t is not None])


def int_decode(
    scales: Tensor,
    codes: Tensor,
    blocks: Tensor,
    out: Tensor,
    *,
    bits: int,
    weight: float = 1.0,
    add: bool = False,
) -> None:
    """Writes `weight * (scale * code)` to `out` (1-D fp32, bf16, fp16), or adds it."""
    if bits not in (4, 8):
        raise ValueError(f"int_decode: bits must be 4 or 8, but is {bits}")
    if not _gpu.takes(out):
        codes_reference.int_decode(scales, codes, blocks, out, bits=bits, weight=weight, add=add)
        return
    _native.core.int_decode(scales, codes, blocks.to(out.device), out, bits, weight, add, threads.count())
    increment_version([out])
