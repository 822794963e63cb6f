"""What every compressor promises, and what each one is good at."""

from __future__ import annotations

import pytest
import torch

from ds_comm.compress import Blocks, Compressor, Fp8Compressor, IntCompressor, SignCompressor, TopKCompressor

ALL: list[Compressor] = [
    SignCompressor(block_numel=256),
    IntCompressor(bits=8),
    IntCompressor(bits=4),
    IntCompressor(bits=4, rounding="stochastic"),
    Fp8Compressor(),
    Fp8Compressor(dtype=torch.float8_e5m2),
    TopKCompressor(block_numel=256, kept=16),
]
SIZES = [1000, 1, 300, 64]


@pytest.mark.parametrize("compressor", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_decoded_values_and_residual_are_the_input(
    compressor: Compressor, dtype: torch.dtype, kept: torch.dtype
) -> None:
    blocks, offsets = Blocks.of(SIZES, compressor.block_numel)
    x, residual = torch.randn(blocks.numel).to(dtype), torch.randn(blocks.numel).to(kept)
    gap = slice(offsets[1] + 1, offsets[2])
    expected, before = x.float() + residual.float(), residual.clone()
    payload, out = compressor.payload_like(blocks, x.device), torch.full((blocks.numel,), 7.0)
    assert payload.numel() == compressor.payload_bytes(blocks)
    assert payload.numel() % 16 == 0
    compressor.encode(x, payload, blocks, residual=residual, seed=3)
    compressor.decode(payload, out, blocks)
    tolerance = 1e-5 if kept == torch.float32 else 3e-2
    for offset, numel in zip(offsets, SIZES, strict=True):
        here = slice(offset, offset + numel)
        torch.testing.assert_close(
            out[here] + residual[here].float(), expected[here], rtol=tolerance, atol=tolerance
        )
    assert (out[gap] == 7.0).all() and torch.equal(residual[gap], before[gap])
    twice = out.clone()
    compressor.decode(payload, twice, blocks, weight=0.5, add=True)
    here = slice(0, 1000)
    torch.testing.assert_close(twice[here], 1.5 * out[here])


@pytest.mark.parametrize("compressor", ALL, ids=repr)
def test_error_feedback_loses_nothing_over_many_calls(compressor: Compressor) -> None:
    """The mean of what arrives converges to the input, for every compressor: the residual stays bounded."""
    blocks = Blocks.uniform(512, compressor.block_numel)
    x, residual, total = torch.randn(512), torch.zeros(512), torch.zeros(512)
    calls = 200
    for call in range(calls):
        payload, out = compressor.payload_like(blocks, x.device), torch.empty(512)
        compressor.encode(x, payload, blocks, residual=residual, seed=call)
        compressor.decode(payload, out, blocks)
        total += out
    torch.testing.assert_close(total / calls + residual / calls, x, rtol=1e-4, atol=1e-4)
    assert residual.norm() < 25 * x.norm()
    assert (total / calls - x).norm() < 0.15 * x.norm()


def test_errors_of_one_call() -> None:
    x, blocks = torch.randn(4096), Blocks.uniform(4096, 256)

    def error(compressor: Compressor) -> float:
        cut = Blocks.uniform(4096, compressor.block_numel)
        payload, out = compressor.payload_like(cut, x.device), torch.empty(4096)
        compressor.encode(x, payload, cut)
        compressor.decode(payload, out, cut)
        return float((out - x).norm() / x.norm())

    assert len(blocks) == 16
    assert error(IntCompressor(bits=8)) < 0.01 < error(IntCompressor(bits=4)) < 0.16
    assert error(IntCompressor(bits=4)) < error(IntCompressor(bits=4, rounding="stochastic"))
    assert error(Fp8Compressor()) < 0.04
    assert error(SignCompressor()) < 0.65
    assert error(TopKCompressor(block_numel=256, kept=128)) < error(TopKCompressor(block_numel=256, kept=16))


def test_small_elements_beside_large_ones() -> None:
    """fp8 has a relative error; integers have an absolute one."""
    x, blocks = torch.full((256,), 1e-3), Blocks.uniform(256, 256)
    x[0] = 1.0
    errors = []
    for compressor in (Fp8Compressor(), IntCompressor(bits=8)):
        payload, out = compressor.payload_like(blocks, x.device), torch.empty(256)
        compressor.encode(x, payload, blocks)
        compressor.decode(payload, out, blocks)
        errors.append(float((out[1:] - x[1:]).abs().max()) / 1e-3)
    assert errors[0] < 1 / 16 < errors[1]


@pytest.mark.parametrize("compressor", ALL, ids=repr)
def test_values_that_are_not_finite_are_not_hidden(compressor: Compressor) -> None:
    x, blocks = torch.randn(256), Blocks.uniform(256, compressor.block_numel)
    x[5] = torch.nan
    payload, out = compressor.payload_like(blocks, x.device), torch.empty(256)
    compressor.encode(x, payload, blocks)
    compressor.decode(payload, out, blocks)
    assert not out.isfinite().all()


def test_large_indices_of_top_k() -> None:
    x, blocks = torch.zeros(65536), Blocks.uniform(65536, 65536)
    x[[0, 32767, 32768, 65535]] = torch.tensor([1.0, -2.0, 4.0, -8.0])
    compressor = TopKCompressor(block_numel=65536, kept=4)
    payload, out = compressor.payload_like(blocks, x.device), torch.empty(65536)
    compressor.encode(x, payload, blocks)
    compressor.decode(payload, out, blocks)
    assert torch.equal(out, x)


def test_options() -> None:
    with pytest.raises(ValueError, match="IntCompressor: bits must be 4 or 8, but is 5"):
        IntCompressor(bits=5)
    with pytest.raises(ValueError, match="block_numel must be a multiple of 8 between 8 and 4096, but is 12"):
        IntCompressor(block_numel=12)
    with pytest.raises(
        ValueError, match="block_numel must be a multiple of 8 between 8 and 4096, but is 8192"
    ):
        SignCompressor(block_numel=8192)
    with pytest.raises(ValueError, match='must be "nearest" or "stochastic", but is \'up\''):
        IntCompressor(rounding="up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"float8_e4m3fn or torch\.float8_e5m2, but is torch.float16"):
        Fp8Compressor(dtype=torch.float16)
    with pytest.raises(ValueError, match="block_numel must be positive"):
        Fp8Compressor(block_numel=0)
    with pytest.raises(ValueError, match="between 1 and 65536, but is 70000"):
        TopKCompressor(block_numel=70000)
    with pytest.raises(ValueError, match="between 1 and block_numel = 16, but is 17"):
        TopKCompressor(block_numel=16, kept=17)
    with pytest.raises(ValueError, match="payload must have at least 48 uint8 elements"):
        SignCompressor().encode(
            torch.zeros(256), torch.zeros(4, dtype=torch.uint8), Blocks.uniform(256, 2048)
        )
