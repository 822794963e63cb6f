"""Optimizers for host memory with parameters and states in other formats than fp32."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from ds_core import formats, kernels, threads
from ds_offload import CPUSGD, CPUAdagrad, CPUAdam, CPUAdamW, CPULion, PagedOptimizer

Make = Callable[[Iterable[Any]], Optimizer]
SHAPES = [(300, 40), (7,), (33, 5), (40,)]

KINDS: dict[str, tuple[torch.dtype, Make]] = {
    "int8": (torch.float32, lambda p: CPUAdamW(p, lr=1e-2, state_dtype="int8")),
    "bf16": (torch.float32, lambda p: CPUAdamW(p, lr=1e-2, state_dtype="bf16")),
    "split": (torch.bfloat16, lambda p: CPUAdamW(p, lr=1e-2, split_masters=True)),
    "split int8": (torch.bfloat16, lambda p: CPUAdamW(p, lr=1e-2, state_dtype="int8", split_masters=True)),
    "Adagrad": (torch.bfloat16, lambda p: CPUAdagrad(p, lr=1e-2, state_dtype="bf16", split_masters=True)),
    "Lion": (torch.float32, lambda p: CPULion(p, lr=1e-3, state_dtype="bf16")),
    "SGD": (
        torch.bfloat16,
        lambda p: CPUSGD(p, lr=1e-2, momentum=0.9, state_dtype="bf16", split_masters=True),
    ),
}


def _params(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def _step(params: list[Tensor], optimizer: Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    optimizer.step()


def _states(params: list[Tensor], optimizer: Optimizer) -> list[Tensor]:
    return [optimizer.state[p][name] for p in params for name in sorted(optimizer.state[p])]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_state_continues_bit_for_bit(kind: str) -> None:
    dtype, make = KINDS[kind]
    params = _params(dtype)
    optimizer = make(params)
    for number in range(3):
        _step(params, optimizer, number)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    others = [p.clone() for p in params]
    resumed = make(others)
    file.seek(0)
    resumed.load_state_dict(torch.load(file))
    assert _same(_states(params, optimizer), _states(others, resumed))
    for number in (3, 4):
        _step(params, optimizer, number)
        _step(others, resumed, number)
    assert _same(params, others) and _same(_states(params, optimizer), _states(others, resumed))
    copied = copy.deepcopy(optimizer)
    assert copied.state_format == optimizer.state_format  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS)
def test_paged_states_are_the_same_bits(kind: str, tmp_path: Path) -> None:
    dtype, make = KINDS[kind]
    own, paged = _params(dtype), _params(dtype)
    inner = make(paged)
    optimizers = make(own), PagedOptimizer(inner, tmp_path, page_bytes=24_000)
    for number in range(3):
        for params, optimizer in zip((own, paged), optimizers, strict=True):
            _step(params, optimizer, number)
    assert _same(own, paged)
    assert _same(_states(own, optimizers[0]), _states(paged, optimizers[1]))
    optimizers[1].close()


def test_pages_of_8_bit_states_take_2_bytes_an_element(tmp_path: Path) -> None:
    sizes = {}
    for name in ("fp32", "bf16", "int8"):
        params = [torch.zeros(1 << 16)]
        optimizer = PagedOptimizer(CPUAdam(params, state_dtype=name), tmp_path)
        _step(params, optimizer, 0)
        sizes[name] = optimizer.state_bytes
        optimizer.close()
    assert sizes == {"fp32": 8 << 16, "bf16": 4 << 16, "int8": 2 << 16}


def test_split_masters_are_the_fp32_masters() -> None:
    """The parameters are those of fp32 training, rounded; every bit of the masters is kept."""
    split = _params(torch.bfloat16)
    wide = [p.float() for p in split]
    optimizers = CPUAdamW(split, lr=1e-3, split_masters=True), CPUAdamW(wide, lr=1e-3)
    for number in range(20):
        generator = torch.Generator().manual_seed(number)
        for a, b in zip(split, wide, strict=True):
            a.grad = torch.randn(a.shape, generator=generator).bfloat16()
            b.grad = a.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(split, wide, strict=True):
        assert torch.equal(formats.join_master(a, optimizers[0].state[a]["master_bits"]), b)
        assert torch.equal(a, formats.round_away(b))
    plain = _params(torch.bfloat16)
    lossy = CPUAdamW(plain, lr=1e-3)
    for number in range(20):
        _step(plain, lossy, number)
    assert not _same(plain, split)


def test_other_states_are_converted_when_they_are_loaded() -> None:
    params = _params(torch.float32)
    wide = CPUAdam(params)
    for number in range(5):
        _step(params, wide, number)
    packed = CPUAdam([p.clone() for p in params], state_dtype="int8")
    packed.load_state_dict(wide.state_dict())
    back = CPUAdam([p.clone() for p in params])
    back.load_state_dict(packed.state_dict())
    for a, b in zip(_states(params, wide), _states(back.param_groups[0]["params"], back), strict=True):
        torch.testing.assert_close(a, b, rtol=0.5, atol=1e-3)
    again = CPUAdam([p.clone() for p in params], state_dtype="int8")
    again.load_state_dict(packed.state_dict())
    states = [_states(o.param_groups[0]["params"], o) for o in (packed, again)]
    assert _same(*states)


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match=r"CPULion: state_dtype is 'int8': it must be one of 'fp32', 'bf16'"):
        CPULion([torch.zeros(3)], state_dtype="int8")
    with pytest.raises(
        ValueError, match=r"CPUAdam: state_dtype is torch\.float16: squares of gradients below"
    ):
        CPUAdam([torch.zeros(3)], state_dtype=torch.float16)
    param = torch.zeros(3, dtype=torch.float16)
    param.grad = torch.zeros(3, dtype=torch.float16)
    with pytest.raises(
        ValueError, match=r"split_masters is set, but a parameter of shape \(3,\) is torch\.float16"
    ):
        CPUAdam([param], split_masters=True).step()


def test_fp32_parameters_beside_split_masters_and_sgd_without_momentum() -> None:
    for make in (
        lambda p: CPUAdam(p, lr=1e-2, split_masters=True),
        lambda p: CPUSGD(p, lr=1e-2, split_masters=True),
    ):
        mixed = [torch.ones(40), torch.ones(40, dtype=torch.bfloat16)]
        optimizer = make(mixed)
        for number in range(3):
            for param in mixed:
                param.grad = torch.full_like(param, 0.25 + number)
            optimizer.step_fused(mixed, grad_scale=torch.tensor(0.5), out=[None, None])  # type: ignore[attr-defined]
        assert "master_bits" not in optimizer.state[mixed[0]]
        assert torch.equal(formats.join_master(mixed[1], optimizer.state[mixed[1]]["master_bits"]), mixed[0])


def test_a_step_uses_no_more_threads_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    step = kernels.adam_step
    monkeypatch.setattr(
        kernels, "adam_step", lambda *a, **k: (used.append(threads.count()), step(*a, **k))[1]
    )
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    params = _params(torch.float32)
    optimizer = CPUAdam(params)
    _step(params, optimizer, 0)
    optimizer.num_threads = 2
    _step(params, optimizer, 1)
    _step(params, copy.deepcopy(optimizer), 2)
    torch.set_num_threads(before)
    assert used[0] == 3 and used[1] == 2 and copy.deepcopy(optimizer).num_threads == 2
    optimizer.cores = sorted(os.sched_getaffinity(0))[:1]
    _step(params, copy.deepcopy(optimizer), 3)
    assert used[-1] == 1
