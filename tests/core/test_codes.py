"""Codes of 1, 4 and 8 bits: the bits of the reference on every target, and what is promised about them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ds_core import codes, codes_reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
RESIDUALS = (None, torch.float32, torch.bfloat16)
# Gaps, odd lengths, the largest block, a block of one element.
ROWS = [(0, 4096), (4096, 17), (4128, 8), (4136, 1), (4144, 1000), (5200, 255)]
NUMEL = 5500


def _blocks() -> Tensor:
    return torch.tensor(ROWS, dtype=torch.int64)


def _used() -> Tensor:
    mask = torch.zeros(NUMEL, dtype=torch.bool)
    for begin, numel in ROWS:
        mask[begin : begin + numel] = True
    return mask


def _tensor(dtype: torch.dtype) -> Tensor:
    x = torch.randn(NUMEL) * torch.logspace(-3, 3, NUMEL)
    x[4136] = 0.0
    x[3] = -0.0
    return x.to(dtype)


def _used_bytes(bits: int) -> Tensor:
    """Bytes of the codes that belong to a block."""
    mask = torch.zeros(-(-NUMEL * bits // 8), dtype=torch.bool)
    for begin, numel in ROWS:
        mask[begin * bits // 8 : -(-(begin + numel) * bits // 8)] = True
    return mask


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) and torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize(("dtype", "kept"), list(itertools.product(FLOATS, RESIDUALS)))
@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("seed", [None, 2**63 + 12345])
def test_the_bits_of_the_reference(
    dtype: torch.dtype, kept: torch.dtype | None, bits: int, seed: int | None, target: str
) -> None:
    if bits == 1 and seed is not None:
        return
    x = _tensor(dtype)
    found = []
    for module in (codes, codes_reference):
        residual = None if kept is None else torch.linspace(-5, 5, NUMEL).to(kept)
        scales = torch.full((len(ROWS),), 9.0)
        packed = torch.full((-(-NUMEL * bits // 8),), 0xAB, dtype=torch.uint8)
        if bits == 1:
            module.sign_encode(x, _blocks(), scales, packed, residual)
        else:
            module.int_encode(x, _blocks(), scales, packed, residual, bits=bits, seed=seed)
        decoded = []
        for out, weight, add in itertools.product(FLOATS, (1.0, 1.0 / 3.0), (False, True)):
            y = torch.linspace(-2, 2, NUMEL).to(out)
            if bits == 1:
                module.sign_decode(scales, packed, _blocks(), y, weight=weight, add=add)
            else:
                module.int_decode(scales, packed, _blocks(), y, bits=bits, weight=weight, add=add)
            decoded.append(y)
        found.append((scales, packed[_used_bytes(bits)], residual, decoded))
    (scales, packed, residual, decoded), (scales_2, packed_2, residual_2, decoded_2) = found
    assert torch.equal(scales, scales_2)
    assert torch.equal(packed, packed_2)
    assert residual is None or (residual_2 is not None and torch.equal(residual, residual_2))
    for y, y_2 in zip(decoded, decoded_2, strict=True):
        assert torch.equal(y, y_2)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_nothing_outside_of_blocks_is_touched(bits: int, target: str) -> None:
    x, used = _tensor(torch.float32), _used()
    residual, scales = torch.full((NUMEL,), 3.0), torch.empty(len(ROWS))
    packed = torch.zeros(-(-NUMEL * bits // 8), dtype=torch.uint8)
    out = torch.full((NUMEL,), 9.0)
    if bits == 1:
        codes.sign_encode(x, _blocks(), scales, packed, residual)
        codes.sign_decode(scales, packed, _blocks(), out)
    else:
        codes.int_encode(x, _blocks(), scales, packed, residual, bits=bits)
        codes.int_decode(scales, packed, _blocks(), out, bits=bits)
    assert (residual[~used] == 3.0).all()
    assert (out[~used] == 9.0).all()
    assert not packed[~_used_bytes(bits)].any()
    torch.testing.assert_close(out[used] + residual[used], x[used] + 3.0, rtol=1e-6, atol=1e-3)


def test_the_scale_of_signs_is_the_best_one() -> None:
    x, blocks = torch.randn(1000), torch.tensor([[0, 1000]])
    scales, packed, out = torch.empty(1), torch.empty(125, dtype=torch.uint8), torch.empty(1000)
    codes.sign_encode(x, blocks, scales, packed)
    codes.sign_decode(scales, packed, blocks, out)
    error = (x - out).square().sum()
    for factor in (0.99, 1.01):
        assert (x - out * factor).square().sum() > error
    assert error < x.square().sum()


@pytest.mark.parametrize("bits", [4, 8])
def test_stochastic_rounding_is_unbiased_and_repeatable(bits: int, target: str) -> None:
    numel = 4096
    x, blocks = torch.linspace(-1, 1, numel), torch.tensor([[0, numel]])
    total = torch.zeros(numel, dtype=torch.float64)
    rounds = 400
    for seed in range(rounds):
        scales, packed, out = torch.empty(1), torch.empty(numel, dtype=torch.uint8), torch.empty(numel)
        codes.int_encode(x, blocks, scales, packed, bits=bits, seed=seed)
        codes.int_decode(scales, packed, blocks, out, bits=bits)
        total += out
    step = float(scales)
    error = total / rounds - x
    # The mean of `rounds` roundings, each of variance at most step^2 / 4.
    assert error.abs().max() < 5 * step / 2 / rounds**0.5
    assert abs(error.mean()) < 5 * step / 2 / (rounds * numel) ** 0.5
    again = torch.empty_like(packed)
    codes.int_encode(x, blocks, scales, again, bits=bits, seed=rounds - 1)
    assert torch.equal(again[: numel * bits // 8], packed[: numel * bits // 8])


def test_random_numbers_belong_to_elements_not_to_tasks(target: str) -> None:
    numel = 300_000
    x, table = torch.randn(numel), codes_blocks(numel, 256)
    whole, part = torch.empty(numel, dtype=torch.uint8), torch.zeros(numel, dtype=torch.uint8)
    scales = torch.empty(table.shape[0])
    torch.set_num_threads(3)
    codes.int_encode(x, table, scales, whole, bits=8, seed=1)
    torch.set_num_threads(1)
    half = table.shape[0] // 2
    codes.int_encode(x, table[:half].clone(), scales[:half].clone(), part, bits=8, seed=1)
    codes.int_encode(x, table[half:].clone(), scales[half:].clone(), part, bits=8, seed=1)
    assert torch.equal(whole, part)


def codes_blocks(numel: int, block: int) -> Tensor:
    begins = torch.arange(0, numel, block)
    return torch.stack([begins, (numel - begins).clamp(max=block)], 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_a_block_that_is_not_finite_is_seen(bits: int, bad: float, target: str) -> None:
    x = torch.randn(512)
    x[300] = bad
    table, residual = codes_blocks(512, 256), torch.zeros(512)
    scales, packed, out = torch.empty(2), torch.empty(512, dtype=torch.uint8), torch.empty(512)
    if bits == 1:
        codes.sign_encode(x, table, scales, packed, residual)
        codes.sign_decode(scales, packed, table, out)
    else:
        codes.int_encode(x, table, scales, packed, residual, bits=bits)
        codes.int_decode(scales, packed, table, out, bits=bits)
    assert scales[0].isfinite() and out[:256].isfinite().all() and residual[:256].isfinite().all()
    assert not scales[1].isfinite() and not out[256:].isfinite().any()


@pytest.mark.parametrize("bits", [4, 8])
def test_values_too_small_for_a_scale_stay_in_the_residual(bits: int, target: str) -> None:
    x, table, residual = torch.full((64,), 1e-40), codes_blocks(64, 64), torch.zeros(64)
    scales, packed = torch.empty(1), torch.empty(64, dtype=torch.uint8)
    codes.int_encode(x, table, scales, packed, residual, bits=bits, seed=3)
    assert scales[0] == 0.0
    assert torch.equal(residual, x)


def test_errors_name_the_block() -> None:
    x, scales, packed = torch.randn(64), torch.empty(2), torch.empty(8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"sign_encode: blocks\[1\] = \(16, 8\) must begin .* behind 24"):
        codes.sign_encode(x, torch.tensor([[0, 17], [16, 8]]), scales, packed)
    with pytest.raises(ValueError, match=r"blocks\[0\] = \(4, 8\) must begin at a multiple of 8"):
        codes.sign_encode(x, torch.tensor([[4, 8]]), scales[:1], packed)
    with pytest.raises(ValueError, match=r"blocks\[0\] = \(0, 65\) .* within the tensor's 64"):
        codes.sign_encode(x, torch.tensor([[0, 65]]), scales[:1], packed)
    with pytest.raises(ValueError, match="scales has 2 elements, but there are 1 blocks"):
        codes.sign_encode(x, torch.tensor([[0, 64]]), scales, packed)
    with pytest.raises(ValueError, match="codes has 8 bytes, but needs 32"):
        codes.int_encode(x, torch.tensor([[0, 64]]), scales[:1], packed, bits=4)
    with pytest.raises(ValueError, match="bits must be 4 or 8, but is 2"):
        codes.int_encode(x, torch.tensor([[0, 64]]), scales[:1], packed, bits=2)
    with pytest.raises(ValueError, match="bits must be 4 or 8, but is 2"):
        codes.int_decode(scales, packed, torch.tensor([[0, 64]]), x, bits=2)
