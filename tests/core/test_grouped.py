"""Native kernels of experts against their references, for every CPU target."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from ds_core import _native, grouped, grouped_feed_forward, large_pages, row_sums
from ds_core.grouped_feed_forward import Weights

pytestmark = pytest.mark.skipif(not _native.has_native(), reason="needs the native kernels")
SIZES = [5, 0, 9, 1]
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(params=_native.core.available_cpu_targets() if _native.has_native() else [None])
def target(request: pytest.FixtureRequest) -> Iterator[None]:
    before = _native.core.cpu_target()
    _native.core.set_cpu_target(request.param)
    yield
    _native.core.set_cpu_target(before)


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape) / 4).to(dtype)


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_products_are_those_of_the_reference(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = randn(15, 48, dtype=dtype), randn(4, 80, 48, dtype=dtype)
    bias, grad = randn(4, 80, dtype=dtype), randn(15, 80, dtype=dtype)
    own = [t.clone().requires_grad_() for t in (x, weight, bias)]
    want = grouped.reference(own[0], own[1], own[2], SIZES)
    grads = torch.autograd.grad(want, own, grad)
    got = (
        grouped.forward(x, weight, bias, SIZES),
        grouped.grad_input(grad, weight, SIZES),
        *grouped.grad_weight(grad, x, weight, SIZES),
    )
    bound = BOUNDS[dtype]
    torch.testing.assert_close(got, (want.detach(), *grads), rtol=bound, atol=bound)
    assert not got[2][1].any() and not got[3][1].any()


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_of_rows_are_those_of_the_reference(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, weights, grad = randn(6, 48, dtype=dtype), randn(4, 2, dtype=dtype), randn(4, 48, dtype=dtype)
    index = torch.tensor([[3, 0], [6, 5], [1, 6], [2, 4]])
    own = [rows.clone().requires_grad_(), weights.clone().requires_grad_()]
    want = row_sums.reference(own[0], index, own[1])
    grads = torch.autograd.grad(want, own, grad)
    got = (row_sums.forward(rows, index, weights), *row_sums.backward(grad, rows, index, weights))
    bound = BOUNDS[dtype]
    torch.testing.assert_close(got, (want.detach(), *grads), rtol=bound, atol=bound)
    ones = row_sums.reference(rows, index, None)
    torch.testing.assert_close(row_sums.forward(rows, index, None), ones, rtol=bound, atol=bound)


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("activation", grouped_feed_forward.ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_feed_forward_blocks_are_those_of_torch(activation: str, gated: bool) -> None:
    torch.manual_seed(0)
    act = getattr(functional, activation)
    for dtype in (torch.float32, torch.bfloat16):
        layers = [("up", 48, 32), *([("gate", 48, 32)] if gated else []), ("down", 32, 48)]
        tensors: dict[str, Tensor] = {}
        for name, outputs, inputs in layers:
            tensors[name] = randn(4, outputs, inputs, dtype=dtype).requires_grad_()
            tensors[name + "_bias"] = randn(4, outputs, dtype=dtype).requires_grad_()
        x, grad = randn(15, 32, dtype=dtype).requires_grad_(), randn(15, 32, dtype=dtype)
        up = grouped.reference(x, tensors["up"], tensors["up_bias"], SIZES)
        inner = (
            act(grouped.reference(x, tensors["gate"], tensors["gate_bias"], SIZES)) * up if gated else act(up)
        )
        want = grouped.reference(inner, tensors["down"], tensors["down_bias"], SIZES)
        grads = torch.autograd.grad(want, [x, *tensors.values()], grad)
        weights = Weights(**{"gate": None, "gate_bias": None, **{n: t.detach() for n, t in tensors.items()}})
        out, argument, factor = grouped_feed_forward.forward(x.detach(), weights, SIZES, activation)
        of_x, of_weights = grouped_feed_forward.backward(
            grad,
            x.detach(),
            argument,
            factor,
            (weights.up, weights.gate, weights.down),
            SIZES,
            activation,
        )
        bound = BOUNDS[dtype]
        torch.testing.assert_close((out, of_x, *of_weights), (want, *grads), rtol=bound, atol=bound)


def test_sizes_without_a_kernel_take_the_reference() -> None:
    x, weight = torch.randn(15, 20), torch.randn(4, 8, 20)
    assert not grouped.is_native(x.dtype, weight) and not row_sums.is_native(x)
    assert torch.equal(grouped.forward(x, weight, None, SIZES), grouped.reference(x, weight, None, SIZES))
    assert not grouped.is_native(torch.float64, torch.randn(4, 16, 16))


def test_arguments_that_do_not_fit_are_refused() -> None:
    x, weight = torch.randn(15, 16), torch.randn(4, 32, 16)
    with pytest.raises(ValueError, match="grouped_linear: x has 240 elements"):
        grouped.forward(x, weight, None, [5, 0, 9, 2])
    with pytest.raises(ValueError, match="negative number of rows"):
        grouped.forward(x, weight, None, [16, -1, 0, 0])
    with pytest.raises(ValueError, match="weight"):
        grouped.forward(x, weight.bfloat16(), None, SIZES)
    with pytest.raises(ValueError, match="index names a row that does not exist"):
        row_sums.forward(x, torch.tensor([[16]]), None)


def test_watchers_see_operators() -> None:
    """FLOPs are counted, and shapes are known without values."""
    x, weight = torch.randn(15, 16), torch.randn(4, 32, 16)
    with FlopCounterMode(display=False) as counter:
        grouped.forward(x, weight, None, SIZES)
        grouped.grad_weight(torch.randn(15, 32), x, weight, SIZES)
    assert counter.get_total_flops() == 2 * 2 * 15 * 16 * 32
    like = torch.ops.ds_core.grouped_linear(x.to("meta"), weight.to("meta"), None, SIZES)
    assert like.device.type == "meta" and like.shape == (15, 32)


def test_large_pages_are_asked_for_large_tensors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(large_pages, "_advise", lambda: lambda begin, size, _: calls.append((begin, size)))
    large_pages.in_large_pages(torch.empty(1 << 18))
    assert not calls
    tensor = large_pages.in_large_pages(torch.empty(large_pages.LEAST_BYTES, dtype=torch.uint8))
    ((begin, size),) = calls
    assert begin % large_pages.LARGE_PAGE_BYTES == size % large_pages.LARGE_PAGE_BYTES == 0
    assert tensor.data_ptr() <= begin and begin + size <= tensor.data_ptr() + tensor.numel()
