"""Without the native module the same functions run on their references, and say so."""

from __future__ import annotations

import subprocess
import sys
import textwrap

CODE = textwrap.dedent(
    """
    import sys
    sys.modules["ds_core._core"] = None  # as on a machine where the module cannot be loaded
    import torch
    from ds_core import _native, arena, codes, kernels, optim, report
    assert not _native.has_native()
    p = torch.nn.Parameter(torch.randn(600_000))
    q = torch.nn.Parameter(p.detach().clone())
    p.grad = torch.randn(600_000)
    q.grad = p.grad.clone()
    optim.FusedAdam([p], lr=0.1, weight_decay=0.1).step()
    torch.optim.AdamW([q], lr=0.1, weight_decay=0.1, foreach=False).step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert kernels.squared_norm([torch.ones(10)]) == (10.0, True)
    bits, scale = kernels.pack_signs(torch.tensor([1.0, -3.0]))
    assert (bits.tolist(), scale) == ([2], 2.0)
    assert kernels.unpack_signs(bits, scale, torch.empty(2)).tolist() == [2.0, -2.0]
    packed, scales, block = torch.empty(1, dtype=torch.uint8), torch.empty(1), torch.tensor([[0, 2]])
    codes.sign_encode(torch.tensor([1.0, -3.0]), block, scales, packed)
    assert (packed.item() & 3, scales.item()) == (2, 2.0)
    assert kernels.crc32c(b"123456789") == 0xE3069283
    half = torch.empty(2, dtype=torch.bfloat16)
    kernels.cast(torch.tensor([1.0, 2.0]), half)
    assert half.tolist() == [1.0, 2.0]
    assert arena.empty(10).numel() == 10 and arena.stats().reserved_bytes == 0
    assert not any(v.native for v in report.variants())
    print(report.text())
    """
)


def test_everything_works_without_the_native_module() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "native module    absent: ds_core._core cannot be imported" in done.stdout
