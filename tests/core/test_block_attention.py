"""Native block-sparse attention against its reference, for every CPU target."""

from __future__ import annotations

import pytest
import torch

from ds_core import _native, block_attention, threads
from ds_core.block_attention import BlockRows


def rows(heads: int, count: int, *, causal: bool) -> BlockRows:
    """Each row has the block before, and its own."""
    columns, offsets = [], [0]
    for _ in range(heads):
        for row in range(count):
            columns += [*([row - 1] if row else []), row]
            offsets.append(len(columns))
    return BlockRows(block=16, offsets=torch.tensor(offsets), columns=torch.tensor(columns), causal=causal)


@pytest.mark.skipif(not _native.has_native(), reason="needs the native kernels")
def test_values_and_gradients_are_those_of_the_reference() -> None:
    torch.manual_seed(0)
    target = _native.core.cpu_target()
    for dim, causal, biased in ((16, True, False), (80, False, True)):
        q, grad = torch.randn(2, 4, 64, dim), torch.randn(2, 4, 64, dim)
        k, v = torch.randn(2, 2, 64, dim), torch.randn(2, 2, 64, dim)
        bias = torch.where(torch.rand(2, 64) < 0.2, -1e30, 0.0) if biased else None
        plan = rows(4, 4, causal=causal)
        own = [x.clone().requires_grad_() for x in (q, k, v)]
        want = block_attention.reference(*own, plan, scale=0.2, bias=bias)
        expected = torch.autograd.grad(want[0], own, grad)
        try:
            for name in _native.core.available_cpu_targets():
                _native.core.set_cpu_target(name)
                got = block_attention.forward(q, k, v, plan, scale=0.2, bias=bias)
                torch.testing.assert_close(got, (want[0].detach(), want[1].detach()), atol=3e-5, rtol=1e-4)
                grads = block_attention.backward(grad, (q, k, v), got, plan, scale=0.2, bias=bias)
                torch.testing.assert_close(grads, expected, atol=5e-5, rtol=1e-3)
                with threads.limited(1):
                    assert torch.equal(
                        block_attention.forward(q, k, v, plan, scale=0.2, bias=bias)[0], got[0]
                    )
        finally:
            _native.core.set_cpu_target(target)


@pytest.mark.skipif(not _native.has_native(), reason="needs the native kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_inputs_and_results_are_rounded_and_nothing_between(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    wide = [torch.randn(2, 4, 64, 48).to(dtype) for _ in range(2)] + [
        torch.randn(2, 2, 64, 48).to(dtype) for _ in range(2)
    ]
    bias = torch.where(torch.rand(2, 64) < 0.2, -1e30, 0.0)
    plan = rows(4, 4, causal=True)
    q, grad, k, v = (x.float() for x in wide)
    out, lse = block_attention.forward(q, k, v, plan, scale=0.2, bias=bias)
    target = _native.core.cpu_target()
    try:
        for name in _native.core.available_cpu_targets():
            _native.core.set_cpu_target(name)
            got, sums = block_attention.forward(wide[0], wide[2], wide[3], plan, scale=0.2, bias=bias)
            assert sums.dtype == torch.float32 and got.dtype == dtype
            torch.testing.assert_close(sums, lse)
            rounding = torch.finfo(dtype).eps
            torch.testing.assert_close(got.float(), out, rtol=rounding, atol=1e-5)
            own = (wide[0], wide[2], wide[3])
            grads = block_attention.backward(wide[1], own, (got, sums), plan, scale=0.2, bias=bias)
            # delta = rowsum(grad out) is that of the rounded output.
            expected = block_attention.backward(
                grad, (q, k, v), (got.float(), sums), plan, scale=0.2, bias=bias
            )
            for one, other in zip(grads, expected, strict=True):
                assert one.dtype == dtype
                torch.testing.assert_close(one.float(), other, rtol=rounding, atol=1e-5)
    finally:
        _native.core.set_cpu_target(target)
    with pytest.raises(ValueError, match="k"):
        block_attention.forward(wide[0], k, v, plan, scale=0.2)


@pytest.mark.skipif(not _native.has_native(), reason="needs the native kernels")
def test_arguments_that_do_not_fit_are_refused() -> None:
    q, k = torch.randn(1, 2, 32, 16), torch.randn(1, 2, 32, 16)
    plan = rows(2, 2, causal=False)
    with pytest.raises(ValueError, match="columns be block rows of the tensors"):
        block_attention.forward(
            q, k, k, BlockRows(block=16, offsets=plan.offsets, columns=plan.columns + 1), scale=1.0
        )
    with pytest.raises(ValueError, match="offsets"):
        block_attention.forward(q, k, k, rows(1, 2, causal=False), scale=1.0)
    with pytest.raises(ValueError, match="33 tokens are not a multiple"):
        block_attention.forward(torch.randn(1, 2, 33, 16), k, k, plan, scale=1.0)
    with pytest.raises(ValueError, match="k"):
        block_attention.forward(q, k.transpose(2, 3), k, plan, scale=1.0)
    assert not block_attention.is_native(q.double(), 16) and not block_attention.is_native(q, 8)
    out, lse = block_attention.forward(q.double(), k.double(), k.double(), plan, scale=0.3)
    assert out.dtype == lse.dtype == torch.float64
