"""The kernels of Triton for experts: interpreted on the CPU against a loop, and compiled for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.full,  # triton takes a gigabyte
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]

# bf16 is left to GPUs: the interpreter multiplies its bits as if they were integers.
INTERPRETED = """
import torch
from types import SimpleNamespace
from ds_moe.experts.grouped_linear import reference_linear
from ds_moe.experts.grouped_triton import grouped_linear

torch.manual_seed(0)
for dtype in (torch.float32, torch.float16):
    for sizes in ([5, 0, 40, 17], [0, 0, 0, 3], [100, 90, 0, 80], [0, 0, 0, 0]):
        for has_bias in (True, False):
            rows = sum(sizes)
            shapes = [(rows, 40), (4, 72, 40), (4, 72)][: 3 if has_bias else 2]
            given = [(torch.randn(shape) / 4).to(dtype).requires_grad_() for shape in shapes]
            wide = [x.detach().float().requires_grad_() for x in given]
            grad = torch.randn(rows, 72).to(dtype)
            bias = [None] * (not has_bias)
            out = grouped_linear(*given, *bias, sizes)
            out.backward(grad)
            expected = reference_linear(*wide, *bias, SimpleNamespace(padded=0, sizes=sizes))
            expected.backward(grad.float())
            for a, b in zip([out, *(x.grad for x in given)], [expected, *(x.grad for x in wide)]):
                torch.testing.assert_close(a, b.to(dtype), rtol=2e-3, atol=2e-2 if dtype == torch.float16 else 1e-4)
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ds_moe.experts import grouped_triton as kernels

TARGETS = (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64))
FLAGS = {"HAS_BIAS": True, "PRECISION": "ieee"}
TILES = {
    kernels._rows_kernel: {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32},
    kernels._weight_kernel: {"ROWS": 32, "OUT": 64, "IN": 64},
}
for target in TARGETS:
    for dtype in ("fp32", "fp16", "bf16"):
        for kernel, tile in TILES.items():
            constants = {**FLAGS, **tile}
            types = {name: "i32" for name in kernel.arg_names}
            types |= {name: f"*{dtype}" for name in ("a", "b", "bias", "out", "grad", "x", "bias_out") if name in types}
            types |= {name: "*i32" for name in ("tiles", "ends") if name in types}
            types |= {name: "constexpr" for name in constants}
            source = ASTSource(kernel, types, {(kernel.arg_names.index(k),): v for k, v in constants.items()})
            made = triton.compile(source, target=target)
            assert "dot" in made.asm["ttir"] and len(made.asm["cubin" if target.backend == "cuda" else "hsaco"]) > 0
"""


def _run(code: str, **environ: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_results_are_those_of_a_loop() -> None:
    _run(INTERPRETED, TRITON_INTERPRET="1")


def test_the_kernels_compile_for_gpus() -> None:
    _run(COMPILED, TRITON_INTERPRET="0")
