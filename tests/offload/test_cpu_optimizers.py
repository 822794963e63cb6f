"""The optimizers for host memory: ds_core's arithmetic, states in the arena, 16-bit parameters, sparse gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import ds_core.optim
import ds_offload
from ds_core import arena

Make = Callable[[Iterable[Any]], Optimizer]

PAIRS: dict[str, tuple[Make, Make]] = {
    "CPUAdam": (
        lambda p: ds_offload.CPUAdam(p, lr=1e-2, weight_decay=0.1),
        lambda p: ds_core.optim.FusedAdam(p, lr=1e-2, weight_decay=0.1),
    ),
    "CPUAdamW": (
        lambda p: ds_offload.CPUAdamW(p, lr=1e-2),
        lambda p: ds_core.optim.FusedAdam(p, lr=1e-2, weight_decay=0.01),
    ),
    "bf16 states": (
        lambda p: ds_offload.CPUAdam(p, lr=1e-2, state_dtype=torch.bfloat16),
        lambda p: ds_core.optim.FusedAdam(p, lr=1e-2, weight_decay=0.0, state_dtype=torch.bfloat16),
    ),
    "CPUAdagrad": (
        lambda p: ds_offload.CPUAdagrad(p, lr=1e-2, initial_accumulator_value=0.1),
        lambda p: ds_core.optim.FusedAdagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    ),
    "CPULion": (lambda p: ds_offload.CPULion(p, lr=1e-3), lambda p: ds_core.optim.FusedLion(p, lr=1e-3)),
    "CPUSGD": (
        lambda p: ds_offload.CPUSGD(p, lr=1e-2, momentum=0.9, nesterov=True),
        lambda p: ds_core.optim.FusedSGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    ),
    "without momentum": (
        lambda p: ds_offload.CPUSGD(p, lr=1e-2),
        lambda p: ds_core.optim.FusedSGD(p, lr=1e-2),
    ),
}
WHOLE: dict[str, tuple[Make, Make]] = {
    "CPULamb": (lambda p: ds_offload.CPULamb(p, lr=1e-2), lambda p: ds_core.optim.FusedLamb(p, lr=1e-2)),
    "CPUMuon": (lambda p: ds_offload.CPUMuon(p, lr=1e-2), lambda p: ds_core.optim.Muon(p, lr=1e-2)),
}


def gradients(step: int, params: list[Tensor], dtype: torch.dtype = torch.float32) -> None:
    torch.manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape).to(dtype)


@pytest.mark.parametrize("kind", [*PAIRS, *WHOLE])
def test_it_has_the_bits_of_ds_core_and_its_states_in_the_arena(kind: str) -> None:
    make, reference = {**PAIRS, **WHOLE}[kind]
    before = arena.stats().in_use_bytes
    shapes = [(300, 40), (7,), (33, 5)]
    torch.manual_seed(9)
    own = [torch.randn(shape) for shape in shapes]
    expected = [value.clone() for value in own]
    optimizers = make(own), reference(expected)
    for step in range(3):
        for params, optimizer in zip((own, expected), optimizers, strict=True):
            gradients(step, params)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))
    if kind != "without momentum":
        assert arena.stats().in_use_bytes > before
        loaded = reference([value.clone() for value in own])
        loaded.load_state_dict(optimizers[0].state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", PAIRS)
def test_16_bit_parameters_are_updated_in_fp32_and_rounded(kind: str, dtype: torch.dtype) -> None:
    make, reference = PAIRS[kind]
    torch.manual_seed(9)
    shapes = [(700, 800), (5,)]  # more and fewer elements than a slice
    own = [torch.randn(shape).to(dtype) for shape in shapes] + [torch.randn(6)]
    wide = [value.float().clone() for value in own]
    optimizer, other = make(own), reference(wide)
    for step in range(3):
        torch.manual_seed(step)
        for value, big in zip(own, wide, strict=True):
            value.grad = torch.randn(value.shape).to(value.dtype)
            big.grad = value.grad.float()
            big.copy_(value.float())
        optimizer.step()
        other.step()
        assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(own, wide, strict=True))
    scale, out = torch.tensor(0.5), [None, torch.zeros(5), torch.zeros(6)]
    for value, big in zip(own, wide, strict=True):
        big.copy_(value.float())
        big.grad = value.grad.float() * 0.5  # type: ignore[union-attr]
    optimizer.step_fused(own, grad_scale=scale, out=out)  # type: ignore[attr-defined]
    other.step()
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(own, wide, strict=True))
    assert torch.equal(out[1], own[1].float()) and torch.equal(out[2], own[2])  # type: ignore[arg-type]


def test_sparse_gradients_give_the_result_of_dense_ones() -> None:
    torch.manual_seed(0)
    tables = [nn.Embedding(50, 8, sparse=sparse) for sparse in (True, False)]
    tables[1].load_state_dict(tables[0].state_dict())
    optimizers = [ds_offload.CPUAdagrad(table.parameters(), lr=0.1) for table in tables]
    for step in range(4):
        torch.manual_seed(step)
        rows = torch.randint(0, 50, (12,))  # some of them twice
        for table, optimizer in zip(tables, optimizers, strict=True):
            (table(rows) * torch.arange(8.0)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(tables[0].weight, tables[1].weight)
    assert torch.equal(
        optimizers[0].state[tables[0].weight]["sum"], optimizers[1].state[tables[1].weight]["sum"]
    )
    decaying = ds_offload.CPUAdagrad(tables[0].parameters(), weight_decay=0.1)
    tables[0](torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"weight_decay 0\.1 with sparse gradients"):
        decaying.step()


def test_what_cannot_be_stepped_is_refused() -> None:
    param = nn.Parameter(torch.ones(3, dtype=torch.float64))
    param.grad = torch.ones(3, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"CPULion: a parameter of shape \(3,\) is torch.float64: .* fp32, bf16 and fp16"
    ):
        ds_offload.CPULion([param]).step()
    half = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    half.grad = torch.ones(3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"CPULamb: .* is torch.bfloat16: CPULamb steps fp32 parameters"):
        ds_offload.CPULamb([half]).step()
