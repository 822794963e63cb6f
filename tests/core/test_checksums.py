"""Checksums of blocks, alone and computed in the pass of an optimizer step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_core import kernels, optim, reference

BLOCK = kernels.CHECKSUM_BLOCK_NUMEL
SIZES = (1, 15, 16, 17, BLOCK - 1, BLOCK, 9 * BLOCK + 77)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def rows(num_rows: int, tensors: list[Tensor]) -> list[Tensor]:
    return [
        torch.zeros(num_rows, kernels.num_checksums(t.numel()), dtype=torch.int64, device=t.device)
        for t in tensors
    ]


def of(tensors: list[Tensor]) -> list[Tensor]:
    """Checksums by the reference."""
    return list(reference.checksums(tensors, [row[0] for row in rows(1, tensors)]))


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_reference_on_every_target(dtype: torch.dtype, target: str) -> None:
    tensors = [torch.randn(n).to(dtype) for n in (0, *SIZES)]
    tensors.append(torch.randn(BLOCK + 40).to(dtype)[3:])  # at an odd address
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, kernels.checksums(tensors), of(tensors)))


def test_what_is_always_noticed(target: str) -> None:
    x = torch.randn(BLOCK)
    x[::5] = 0.0
    [before] = kernels.checksums([x])
    words = x.view(torch.int32)
    for index in (0, 1, 777, BLOCK - 1):
        for bit in range(32):
            flip = torch.tensor(-(1 << 31) if bit == 31 else 1 << bit, dtype=torch.int32)
            words[index].bitwise_xor_(flip)
            assert not torch.equal(kernels.checksums([x])[0], before)
            words[index].bitwise_xor_(flip)
    for i, j in ((0, 1), (0, 1024), (3, BLOCK - 1)):
        exchanged = x.clone()
        exchanged[[i, j]] = x[[j, i]]
        assert not torch.equal(kernels.checksums([exchanged])[0], before)
    assert torch.equal(kernels.checksums([x])[0], before)


STEPS: list[tuple[str, int, dict[str, Any]]] = [
    ("adam_step", 2, {"step": 3, "lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}),
    ("adagrad_step", 1, {"step": 2, "lr": 1e-2}),
    ("lion_step", 1, {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99}),
    ("sgd_step", 1, {"first": False, "lr": 0.1, "momentum": 0.9}),
    ("sgd_step", 0, {"first": False, "lr": 0.1}),
]


@pytest.mark.parametrize(("name", "num_states", "options"), STEPS)
@pytest.mark.parametrize(("state", "grad"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float16)])
def test_a_step_sums_what_it_reads_and_writes(
    name: str, num_states: int, options: dict[str, Any], state: torch.dtype, grad: torch.dtype, target: str
) -> None:
    step: Callable[..., None] = getattr(kernels, name)
    params = [torch.randn(n) for n in SIZES]
    states = [[torch.rand(n).to(state) for n in SIZES] for _ in range(num_states)]
    grads = [torch.randn(n).to(grad) for n in SIZES]
    lists = states if num_states or name != "sgd_step" else [None]
    plain = copy.deepcopy((params, lists))
    step(plain[0], *plain[1], grads, grad_scale=0.5, **options)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        mine = copy.deepcopy((params, lists))
        old = [of(grads), of(mine[0]), *(of(s) for s in mine[1] if s is not None)]
        read, written = rows(2 + num_states, params), rows(2 + num_states, params)
        step(mine[0], *mine[1], grads, grad_scale=0.5, checksums=(read, written), **options)
        new = [of(mine[0]), *(of(s) for s in mine[1] if s is not None)]
        for i, now in enumerate(mine[0]):
            assert torch.equal(now, plain[0][i]), "checksums change no bit"
            assert torch.equal(read[i], torch.stack([row[i] for row in old]))
            assert torch.equal(written[i][1:], torch.stack([row[i] for row in new]))
            assert not written[i][0].any()


def _adam(params: list[Tensor]) -> optim.FusedAdam:
    return optim.FusedAdam(params, lr=0.1)


@pytest.mark.parametrize(
    "make",
    [
        _adam,
        lambda params: optim.FusedSGD(params, lr=0.1),
        lambda params: optim.FusedLamb(params, lr=0.1),
        lambda params: optim.Muon(params, lr=0.1),
    ],
    ids=["adam", "sgd", "lamb", "muon"],
)
def test_every_fused_optimizer(make: Callable[[list[Tensor]], optim.FusedOptimizer]) -> None:
    shapes = [(96, 64), (5000,), (3,)]
    params = [torch.randn(s).requires_grad_() for s in shapes]
    plain = [p.detach().clone().requires_grad_() for p in params]
    optimizer, other = make(params), make(plain)
    one, none = torch.tensor(1.0), [None] * 3
    for step in range(3):
        for a, b in zip(params, plain, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        if step == 1:
            params[1].grad = plain[1].grad = None
        names = [optimizer.checksummed_states(p) for p in params]
        read = [rows(2 + len(n), [p])[0] for n, p in zip(names, params, strict=True)]
        written = [torch.zeros_like(r) for r in read]
        before = [of([p.detach()])[0] for p in params]
        optimizer.step_checksummed(params, grad_scale=one, out=none, read=read, written=written)
        other.step_fused(plain, grad_scale=one, out=none)
        for i, param in enumerate(params):
            assert torch.equal(param, plain[i])
            if step == 1 and i == 1:
                assert not read[i].any() and not written[i].any()
                continue
            assert param.grad is not None
            assert torch.equal(read[i][0], of([param.grad])[0]) and torch.equal(read[i][1], before[i])
            held = [optimizer.state[param][name] for name in names[i]]
            assert torch.equal(written[i][1:], torch.stack(of([param.detach(), *held])))


def test_wrong_sums_are_refused() -> None:
    x = [torch.ones(BLOCK + 1)]
    for bad, match in (
        ([torch.zeros(4, 1, dtype=torch.int64)], r"checksums\[0\]\[0\] has 4 elements"),
        ([torch.zeros(4, 2)], r"checksums\[0\]\[0\] must be int64"),
        ([], r"checksums\[0\] has 0 tensors, but params has 1"),
    ):
        with pytest.raises(ValueError, match=match):
            kernels.adam_step(
                x, [x[0].clone()], [x[0].clone()], x, step=1, lr=1.0, beta1=0.9, beta2=0.9, eps=0.1,
                weight_decay=0.0, checksums=(bad, rows(4, x)),
            )  # fmt: skip
    with pytest.raises(ValueError, match=r"checksums: out\[0\] has 1 elements"):
        kernels.checksums(x, [torch.zeros(1, dtype=torch.int64)])


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    device = torch.device("cuda")
    tensors = [torch.randn(n) for n in SIZES]
    sums = kernels.checksums([t.to(device) for t in tensors])
    assert all(torch.equal(a.cpu(), b) for a, b in zip(sums, of(tensors), strict=True))
    param = torch.randn(5000, device=device, requires_grad=True)
    param.grad = torch.randn_like(param)
    optimizer = _adam([param])
    read, written = rows(4, [param]), rows(4, [param])
    [before] = kernels.checksums([param.detach()])
    optimizer.step_checksummed([param], grad_scale=torch.tensor(1.0), out=[None], read=read, written=written)
    assert torch.equal(read[0][1], before)
    assert torch.equal(written[0][1], kernels.checksums([param.detach()])[0])
