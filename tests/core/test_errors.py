"""A user's mistakes: ValueError with the function, the argument, what is wrong and what would be right."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_core import _native, kernels

OPTIONS: dict[str, Any] = {
    "step": 1,
    "lr": 0.1,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
}


def lists(**replaced: Any) -> dict[str, Any]:
    tensors: dict[str, Any] = {
        name: [torch.randn(8), torch.randn(8)] for name in ("params", "exp_avgs", "exp_avg_sqs", "grads")
    }
    return tensors | OPTIONS | replaced


def second(tensor: Tensor) -> list[Tensor]:
    return [torch.randn(8), tensor]


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"params": second(torch.randn(8).double())}, r"params\[1\] must be float32, but is float64"),
        (
            {"exp_avgs": second(torch.randn(8).half())},
            r"exp_avgs\[1\] must be float32 or bfloat16, but is float16",
        ),
        (
            {"exp_avg_sqs": second(torch.randn(8).bfloat16())},
            r"exp_avg_sqs\[1\] must be float32, but is bfloat16",
        ),
        ({"grads": second(torch.ones(8, dtype=torch.int64))}, r"grads\[1\] must be .*float16, but is int64"),
        ({"grads": second(torch.randn(9))}, r"grads\[1\] has 9 elements, but params\[1\] has 8"),
        ({"grads": second(torch.randn(8, 2)[:, 0])}, r"grads\[1\] must be contiguous; pass x.contiguous\(\)"),
        ({"grads": [torch.randn(8)]}, r"grads has 1 tensors, but params has 2"),
        ({"grads": second(torch.randn(8, device="meta"))}, r"grads\[1\] cannot be read as a strided tensor"),
        ({"grads": second(torch.randn(8).to_sparse())}, r"grads\[1\] cannot be read as a strided tensor"),
        (
            {"grads": [torch.randn(8), None]},
            r"grads\[1\] cannot be read as a strided tensor \(it is a NoneType\)",
        ),
        ({"grads": torch.tensor(1.0)}, r"grads must be a sequence of tensors"),
        ({"out": [None, torch.empty(8, dtype=torch.float64)]}, r"out\[1\] must be .*, but is float64"),
        ({"out": [None]}, r"out has 1 tensors, but params has 2"),
        ({"step": 0}, r"step counts from 1, but is 0"),
    ],
)
def test_adam_step_refuses(replaced: dict[str, Any], message: str) -> None:
    arguments = lists(**replaced)
    before = [t.clone() for t in arguments["params"]]
    with pytest.raises(ValueError, match="adam_step: " + message):
        kernels.adam_step(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(arguments["params"], before, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.squared_norm([torch.randn(4).double()]), r"squared_norm: tensors\[0\] must be float32"),
        (lambda: kernels.squared_norm_blocks(torch.randn(4), 0), "block_numel must be positive, but is 0"),
        (lambda: kernels.cast(torch.randn(4), torch.randn(5)), r"cast: dst\[0\] has 5 elements, but src\[0\] has 4"),
        (lambda: kernels.pack_signs(torch.randn(9), torch.empty(1, dtype=torch.uint8)), "bits has 1 elements"),
        (lambda: kernels.pack_signs(torch.randn(8), torch.empty(1)), "bits must be uint8, but is float32"),
        (lambda: kernels.unpack_signs(torch.empty(2, dtype=torch.uint8), 1.0, torch.empty(8)), "bits has 2"),
        (lambda: kernels.crc32c(torch.randn(4, 4).t()), "crc32c: data must be contiguous"),
        (lambda: kernels.crc32c(torch.randn(4, device="meta")), "crc32c: data must be on the CPU, but is on meta"),
        (lambda: kernels.sgd_step([torch.randn(4)], None, [torch.randn(4)], first=True, lr=0.1, momentum=0.9),
         "momentum is 0.9, so momentum_buffers must be a list"),
    ],
)  # fmt: skip
def test_other_kernels_refuse(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def fake(numel: int) -> Tensor:
    with FakeTensorMode():
        return torch.ones(numel + 4)[4:]


def freed(numel: int) -> Tensor:
    """A view, so that DLPack gives an address that is not null."""
    tensor = torch.ones(numel + 4)[4:]
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    ("unfit", "message"),
    [
        (fake(8), "has no memory: it is a FakeTensor, or its storage was freed"),
        (freed(8), "has no memory: it is a FakeTensor, or its storage was freed"),
        (
            torch._neg_view(torch.ones(8)),
            r"is a view whose signs torch flips when it reads; pass x.resolve_neg\(\)",
        ),
        (torch.ones(8, dtype=torch.complex64).conj().imag.contiguous(), None),
    ],
)
@pytest.mark.parametrize("name", ["params", "exp_avgs", "exp_avg_sqs", "grads", "out"])
def test_tensors_whose_memory_is_not_their_value(unfit: Tensor, message: str | None, name: str) -> None:
    arguments = lists(**{name: second(unfit)})
    if message is None:  # resolved by torch already
        kernels.adam_step(**arguments)
        return
    with pytest.raises(ValueError, match=rf"adam_step: {name}\[1\] {message}"):
        kernels.adam_step(**arguments)


def test_checksums_read_values_and_refuse_freed_storages() -> None:
    x = torch.randn(100)
    assert kernels.crc32c(torch._neg_view(x)) == kernels.crc32c(-x)
    with pytest.raises(ValueError, match="crc32c: data has no memory"):
        kernels.crc32c(freed(8))


@pytest.mark.parametrize("name", ["params", "exp_avgs", "exp_avg_sqs", "grads"])
@pytest.mark.parametrize("one", [torch.randn(2, 8), torch.randn(2, 8).to_sparse(), None, 3])
def test_what_is_no_list_of_tensors(name: str, one: Any) -> None:
    what = "is one tensor; pass" if isinstance(one, Tensor) else f"is a {type(one).__name__}"
    with pytest.raises(ValueError, match=f"adam_step: {name} must be a sequence of tensors, but {what}"):
        kernels.adam_step(**lists(**{name: one}))
    states = [torch.ones(8), torch.ones(8)]
    with pytest.raises(ValueError, match="adagrad_step: grads must be a sequence"):  # the binding by itself
        _native.core.adagrad_step(states, states, one, None, 1, 0.1, 0.0, 0.0, 0.0, 1.0, 1, None, None)


def test_iterators_are_read_once_and_their_tensors_live_until_the_end() -> None:
    numel = 100_000  # large enough that freed memory goes back at once
    params = [torch.zeros(numel) for _ in range(8)]
    grads = [torch.full((numel,), float(i + 1)) for i in range(8)]
    out = [torch.zeros(numel, dtype=torch.bfloat16) for _ in params]
    versions = [(p._version, o._version) for p, o in zip(params, out, strict=True)]
    kernels.sgd_step(iter(params), None, (g.clone() for g in grads), first=True, lr=1.0, out=(o for o in out))
    for p, g, o, before in zip(params, grads, out, versions, strict=True):
        assert torch.equal(p, -g)
        assert torch.equal(o, -g.bfloat16())
        assert (p._version, o._version) == (before[0] + 1, before[1] + 1)
    more = [torch.zeros(numel) for _ in params]
    _native.core.sgd_step(  # the binding by itself
        more, None, (g.clone() for g in grads), None, True, 1.0, 0.0, 0.0, 0.0, False, 1.0, 1, None, None
    )
    assert all(torch.equal(p, -g) for p, g in zip(more, grads, strict=True))
    assert kernels.squared_norm(g.clone() for g in grads) == kernels.squared_norm(grads)


class OnlyCapsules:
    """A tensor of another library: no C exchange table, only `__dlpack__`."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self) -> object:
        return self.tensor.__dlpack__()


def test_tensors_without_an_exchange_table_come_through_capsules() -> None:
    x = torch.randn(1000)
    expected = kernels.squared_norm([x])
    assert _native.core.squared_norm([OnlyCapsules(x)], 1) == expected  # type: ignore[list-item]
    with pytest.raises(
        ValueError, match=r"tensors\[0\] must be float32 or bfloat16 or float16, but is int64"
    ):
        _native.core.squared_norm([OnlyCapsules(torch.ones(3, dtype=torch.int64))], 1)  # type: ignore[list-item]


def run_with_target(target: str, code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DS_CPU_TARGET": target}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_environment_chooses_the_baseline() -> None:
    done = run_with_target("baseline", "from ds_core import _native; print(_native.core.cpu_target())")
    assert (done.returncode, done.stdout) == (0, "baseline\n"), done.stderr


def test_a_target_that_is_none_is_refused_by_name() -> None:
    code = "import torch\nfrom ds_core import kernels\nkernels.squared_norm([torch.ones(3)])"
    done = run_with_target("avx1024", code)
    assert done.returncode == 1
    assert "DS_CPU_TARGET='avx1024' is no CPU target; this CPU can run baseline" in done.stderr
