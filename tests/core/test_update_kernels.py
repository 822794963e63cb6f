"""The optimizer kernels against their references: the same bits on every CPU target."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_core import kernels, reference

SIZES = [1, 3, 8, 16, 17, 0, 64, 4096, 70_001]
STATES = (torch.float32, torch.bfloat16)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BETAS = {"beta1": 0.9, "beta2": 0.999}


@dataclass(frozen=True)
class Kernel:
    name: str
    num_states: int
    options: dict[str, Any] = field(default_factory=dict)

    def id(self) -> str:
        changed = {k: v for k, v in self.options.items() if isinstance(v, bool) and k != "first"}
        return "-".join([self.name, *(f"{k}={v}" for k, v in changed.items())])


KERNELS = [
    Kernel(
        "adam_step", 2, {"step": 3, "lr": 1e-3, **BETAS, "eps": 1e-8, "weight_decay": 0.1, "decoupled": True}
    ),
    Kernel(
        "adam_step", 2, {"step": 1, "lr": 0.1, **BETAS, "eps": 1e-8, "weight_decay": 0.1, "decoupled": False}
    ),
    Kernel("adagrad_step", 1, {"step": 5, "lr": 1e-2, "lr_decay": 1e-3, "eps": 1e-10, "weight_decay": 0.1}),
    Kernel("lion_step", 1, {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1}),
    Kernel("sgd_step", 1, {"first": True, "lr": 0.1, "momentum": 0.9, "dampening": 0.1, "nesterov": False}),
    Kernel(
        "sgd_step", 1, {"first": False, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
    ),
    Kernel(
        "lamb_step", 2, {"step": 3, "lr": 1e-2, **BETAS, "eps": 1e-6, "weight_decay": 0.1, "max_ratio": 10.0}
    ),
]


@dataclass
class Tensors:
    params: list[Tensor]
    states: list[list[Tensor]]
    grads: list[Tensor]
    out: list[Tensor | None]

    def call(self, function: Callable[..., None], **options: Any) -> None:
        function(self.params, *self.states, self.grads, out=self.out, **options)

    def all(self) -> list[Tensor]:
        return [*self.params, *itertools.chain(*self.states), *(o for o in self.out if o is not None)]


def make(
    kernel: Kernel,
    state: torch.dtype = torch.float32,
    grad: torch.dtype = torch.float32,
    out: torch.dtype | None = None,
    sizes: list[int] | None = None,
) -> Tensors:
    numels = SIZES if sizes is None else sizes
    return Tensors(
        [torch.randn(n) for n in numels],
        [[(torch.rand(n) * 0.01).to(state) for n in numels] for _ in range(kernel.num_states)],
        [torch.randn(n).to(grad) for n in numels],
        [None if out is None else torch.empty(n, dtype=out) for n in numels],
    )


def lamb_reference(*args: Any, min_ratio: float = 0.0, max_ratio: float = math.inf, **options: Any) -> None:
    lr, out, grad_scale = options.pop("lr"), options.pop("out"), options.pop("grad_scale", 1.0)
    norms = reference.lamb_moments(*args, grad_scale=grad_scale, **options)
    ratios = kernels.trust_ratios(norms, min_ratio, max_ratio)
    reference.lamb_apply(*args[:3], ratios, lr=lr, out=out, **options)


def oracle(kernel: Kernel) -> Callable[..., None]:
    return lamb_reference if kernel.name == "lamb_step" else getattr(reference, kernel.name)


def assert_same_bits(actual: Tensors, expected: Tensors) -> None:
    for a, b in zip(actual.all(), expected.all(), strict=True):
        assert a.dtype == b.dtype
        integer = torch.int32 if a.dtype == torch.float32 else torch.int16
        nan = a.isnan() & b.isnan()
        assert torch.equal(a.view(integer)[~nan], b.view(integer)[~nan])


@pytest.mark.parametrize("kernel", KERNELS, ids=Kernel.id)
def test_same_bits_as_the_reference(kernel: Kernel, target: str) -> None:
    for state, grad, out in itertools.product(STATES, FLOATS, (None, *FLOATS)):
        actual = make(kernel, state, grad, out)
        expected = copy.deepcopy(actual)
        actual.call(getattr(kernels, kernel.name), grad_scale=0.37, **kernel.options)
        expected.call(oracle(kernel), grad_scale=0.37, **kernel.options)
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("kernel", KERNELS, ids=Kernel.id)
def test_grad_scale_is_the_same_as_scaled_gradients(kernel: Kernel, target: str) -> None:
    folded = make(kernel)
    before = copy.deepcopy(folded)
    before.grads = [g * 0.123 for g in before.grads]
    folded.call(getattr(kernels, kernel.name), grad_scale=0.123, **kernel.options)
    before.call(getattr(kernels, kernel.name), **kernel.options)
    assert_same_bits(folded, before)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.name != "lamb_step"], ids=Kernel.id)
def test_cuts_and_threads_do_not_change_bits(kernel: Kernel, target: str) -> None:
    whole = make(kernel, sizes=[50_000], out=torch.bfloat16)
    cut = copy.deepcopy(whole)
    torch.set_num_threads(3)
    whole.call(getattr(kernels, kernel.name), **kernel.options)
    pieces = Tensors([], [[] for _ in cut.states], [], [])
    for begin, end in itertools.pairwise([0, 1, 8, 24, 41, 1000, 1003, 33_333, 50_000]):  # unaligned views
        pieces.params.append(cut.params[0][begin:end])
        pieces.grads.append(cut.grads[0][begin:end])
        pieces.out.append(cut.out[0][begin:end])  # type: ignore[index]
        for mine, all_states in zip(pieces.states, cut.states, strict=True):
            mine.append(all_states[0][begin:end])
    torch.set_num_threads(1)
    pieces.call(getattr(kernels, kernel.name), **kernel.options)
    assert_same_bits(cut, whole)


@pytest.mark.parametrize("kernel", KERNELS, ids=Kernel.id)
def test_inf_and_nan_go_where_the_reference_sends_them(kernel: Kernel, target: str) -> None:
    actual = make(kernel, sizes=[100], out=torch.float16)
    for place, bad in enumerate([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-45, 3.4e38]):
        actual.grads[0][place] = bad
        actual.grads[0][97 - place] = bad  # once in the body, once in the tail
    expected = copy.deepcopy(actual)
    actual.call(getattr(kernels, kernel.name), **kernel.options)
    expected.call(oracle(kernel), **kernel.options)
    assert_same_bits(actual, expected)


def test_mixed_gradients_and_outputs_in_one_call() -> None:
    kernel = KERNELS[0]
    actual = make(kernel, sizes=[100, 200, 300])
    actual.grads = [g.to(d) for g, d in zip(actual.grads, FLOATS, strict=True)]
    actual.out = [None, torch.empty(200, dtype=torch.bfloat16), torch.empty(300)]
    expected = copy.deepcopy(actual)
    actual.call(kernels.adam_step, **kernel.options)
    expected.call(reference.adam_step, **kernel.options)
    assert_same_bits(actual, expected)


def test_no_tensors_is_no_work() -> None:
    kernels.adam_step([], [], [], [], **KERNELS[0].options)
    kernels.lamb_step([], [], [], [], **KERNELS[-1].options)


def test_autograd_sees_the_write() -> None:
    p = torch.randn(10, requires_grad=True)
    loss = (p * p).sum()
    kernels.sgd_step([p], None, [torch.ones(10)], first=True, lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_trust_ratios() -> None:
    norms = torch.tensor([[4.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1e4], [1e4, 1.0]], dtype=torch.float64)
    assert kernels.trust_ratios(norms) == [2.0, 1.0, 1.0, 0.01, 100.0]
    assert kernels.trust_ratios(norms, 0.1, 10.0) == [2.0, 1.0, 1.0, 0.1, 10.0]
