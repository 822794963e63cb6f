"""What ds_zero expects of an optimizer with `step_fused`, run against every implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ds_core.optim import FusedAdam
from ds_offload import CPUAdam
from ds_zero.interfaces import FusedStep

OPTIMIZERS: list[Callable[..., Any]] = [FusedAdam, CPUAdam]


def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(n, generator=generator) for n in (33, 0, 1000, 7)]
    for p in made:
        p.requires_grad_()
        p.grad = torch.randn(p.shape, generator=generator)
    return made


@pytest.fixture(params=OPTIMIZERS, ids=lambda o: o.__name__)
def make(request: pytest.FixtureRequest) -> Callable[..., Any]:
    found: Callable[..., Any] = request.param
    return found


def test_it_is_a_fused_step(make: Callable[..., Any]) -> None:
    assert isinstance(make(tensors()), FusedStep)
    assert not isinstance(torch.optim.AdamW(tensors()), FusedStep)


def test_scale_folded_in_equals_scaled_gradients(make: Callable[..., Any]) -> None:
    folded, scaled = tensors(), tensors()
    a, b = make(folded, lr=0.1, weight_decay=0.1), make(scaled, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        a.step_fused(folded, grad_scale=torch.tensor(0.3), out=[None] * 4)
        for p in scaled:
            assert p.grad is not None
            kept = p.grad.clone()
            p.grad.mul_(torch.tensor(0.3))
        b.step()
        for p, q in zip(scaled, tensors(), strict=True):
            assert q.grad is not None
            p.grad = q.grad.clone()
    del kept
    assert all(torch.equal(p, q) for p, q in zip(folded, scaled, strict=True))


def test_any_subset_in_any_order_equals_one_step(make: Callable[..., Any]) -> None:
    whole, parts = tensors(), tensors()
    a, b = make(whole, lr=0.1), make(parts, lr=0.1)
    for _ in range(2):
        a.step()
        b.step_fused([parts[3], parts[0]], grad_scale=torch.ones(()), out=[None, None])
        b.step_fused([parts[2]], grad_scale=torch.ones(()), out=[None])
    assert all(torch.equal(p, q) for p, q in zip(whole, parts, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_copy_is_the_new_parameter_rounded(make: Callable[..., Any], dtype: torch.dtype) -> None:
    params = tensors()
    out = [torch.empty(p.shape, dtype=dtype) for p in params]
    make(params, lr=0.1).step_fused(params, grad_scale=torch.ones(()), out=out)
    assert all(torch.equal(o, p.detach().to(dtype)) for o, p in zip(out, params, strict=True))
