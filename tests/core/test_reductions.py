"""Sums of squares, casts, signs and checksums."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_core import kernels, reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", FLOATS)
def test_squared_norm(dtype: torch.dtype, target: str) -> None:
    tensors = [torch.randn(n).to(dtype) for n in (0, 1, 15, 16, 17, 40_000)]
    total, finite = kernels.squared_norm(tensors)
    assert finite
    assert (total, finite) == reference.squared_norm(tensors)
    assert total == pytest.approx(sum(t.double().square().sum().item() for t in tensors), rel=1e-12)
    torch.set_num_threads(3)
    assert kernels.squared_norm(tensors) == (total, finite)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 17, 999])
def test_squared_norm_finds_what_is_not_finite(bad: float, place: int, target: str) -> None:
    x = torch.randn(1000)
    x[place] = bad
    assert not kernels.squared_norm([torch.randn(5), x])[1]


def test_squared_norm_does_not_overflow() -> None:
    assert kernels.squared_norm([torch.full((1000,), 3e38)])[1]
    assert kernels.squared_norm([]) == (0.0, True)


@pytest.mark.parametrize("block", [1, 16, 77, 1000, 5000])
def test_squared_norm_blocks(block: int, target: str) -> None:
    x = torch.randn(1000)
    sums = kernels.squared_norm_blocks(x, block)
    assert torch.equal(sums, reference.squared_norm_blocks(x, block))
    parts = [x[i : i + block].clone() for i in range(0, 1000, block)]
    assert sums.tolist() == [kernels.squared_norm([part])[0] for part in parts]


@pytest.mark.parametrize("src", FLOATS)
@pytest.mark.parametrize("dst", FLOATS)
def test_cast(src: torch.dtype, dst: torch.dtype, target: str) -> None:
    if src == torch.float32:
        a = torch.arange(-(2**31), 2**31, 99_991, dtype=torch.int64).to(torch.int32).view(src)
    else:
        a = torch.arange(-(2**15), 2**15).to(torch.int16).view(src)
    b = torch.empty(a.numel(), dtype=dst)
    kernels.cast(a, b)
    expected = a.to(torch.float32).to(dst)
    assert torch.equal(b.isnan(), expected.isnan())
    assert torch.equal(b[~b.isnan()], expected[~b.isnan()])
    assert torch.equal(b[~b.isnan()].signbit(), expected[~b.isnan()].signbit())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("numel", [1, 7, 8, 9, 1000, 33_333])
def test_signs(dtype: torch.dtype, numel: int, target: str) -> None:
    x = torch.randn(numel).to(dtype)
    x[0] = -0.0
    bits, scale = kernels.pack_signs(x)
    expected_bits, expected_scale = reference.pack_signs(x)
    assert torch.equal(bits, expected_bits)
    assert scale == pytest.approx(expected_scale, rel=1e-12)
    out, expected = torch.empty(numel, dtype=dtype), torch.empty(numel, dtype=dtype)
    kernels.unpack_signs(bits, scale, out)
    reference.unpack_signs(bits, scale, expected)
    assert torch.equal(out, expected)
    assert torch.equal(out.signbit(), x.signbit())


def test_pack_signs_into_a_given_buffer() -> None:
    x = torch.randn(100)
    bits = torch.full((13,), 255, dtype=torch.uint8)
    returned, _ = kernels.pack_signs(x, bits)
    assert returned is bits
    assert torch.equal(bits, reference.pack_signs(x)[0])


def test_crc32c_known_answer() -> None:
    assert kernels.crc32c(b"123456789") == reference.crc32c(b"123456789") == 0xE3069283
    assert kernels.crc32c(torch.empty(0)) == kernels.crc32c(b"") == 0


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_crc32c_continues(first: bytes, second: bytes) -> None:
    assert kernels.crc32c(second, kernels.crc32c(first)) == reference.crc32c(first + second)


def test_crc32c_of_tensors() -> None:
    torch.set_num_threads(2)
    x = torch.randn(1_400_000).to(torch.bfloat16)
    data = x.view(torch.uint8).numpy().tobytes()
    crc = kernels.crc32c(data)
    assert kernels.crc32c(x) == crc
    torch.set_num_threads(1)
    assert kernels.crc32c(x.view(1000, 1400)) == crc
    assert kernels.crc32c(x[1:], kernels.crc32c(x[:1])) == crc
    x.view(torch.uint8)[-1] ^= 1
    assert kernels.crc32c(x) != crc
