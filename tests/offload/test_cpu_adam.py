"""CPUAdam: ds_core's arithmetic, states on the arena, and clear refusals."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from ds_core import arena
from ds_core.optim import FusedAdam
from ds_offload import CPUAdam


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 33), nn.Tanh(), nn.Linear(33, 3))


def train(m: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        m(torch.randn(8, 20, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("adamw", [True, False])
def test_it_follows_torch(adamw: bool) -> None:
    a, b = model(), model()
    train(a, CPUAdam(a.parameters(), lr=1e-2, weight_decay=0.1, adamw_mode=adamw))
    reference = torch.optim.AdamW if adamw else torch.optim.Adam
    train(b, reference(b.parameters(), lr=1e-2, weight_decay=0.1))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_it_is_fused_adam_bit_for_bit() -> None:
    a, b = model(), model()
    train(a, CPUAdam(a.parameters(), lr=1e-2, weight_decay=0.1))
    train(b, FusedAdam(b.parameters(), lr=1e-2, weight_decay=0.1))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_states_live_in_the_arena_and_go_with_the_optimizer() -> None:
    before = arena.stats().in_use_bytes
    m = model()
    optimizer = CPUAdam(m.parameters())
    train(m, optimizer, 1)
    numel = sum(p.numel() for p in m.parameters())
    assert arena.stats().in_use_bytes - before >= 8 * numel
    del optimizer
    assert arena.stats().in_use_bytes == before


def test_bf16_states_take_half() -> None:
    m = model()
    optimizer = CPUAdam(m.parameters(), state_dtype=torch.bfloat16)
    train(m, optimizer, 2)
    assert {v.dtype for s in optimizer.state.values() for k, v in s.items() if k != "step"} == {
        torch.bfloat16
    }


def test_state_dict_goes_to_torch_and_back() -> None:
    a, b = model(), model()
    ours = CPUAdam(a.parameters(), lr=1e-2)
    train(a, ours, 2)
    theirs = torch.optim.AdamW(b.parameters(), lr=1e-2, weight_decay=0.0)
    theirs.load_state_dict(ours.state_dict())
    again = CPUAdam(model().parameters(), lr=1e-2)
    again.load_state_dict(theirs.state_dict())
    for s, t in zip(ours.state.values(), again.state.values(), strict=True):
        assert all(torch.equal(s[k], t[k]) for k in ("exp_avg", "exp_avg_sq", "step"))


def test_other_dtypes_are_refused_with_a_remedy() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"shape \(3,\) is torch\.float64.*fp32 masters"):
        CPUAdam([p]).step()


def test_constructing_and_stepping_imports_no_compiler() -> None:
    code = (
        "import sys, torch; from ds_offload import CPUAdam; p = torch.nn.Parameter(torch.ones(3)); o = CPUAdam([p]);"
        "p.grad = torch.ones(3); o.step(); o.zero_grad(); o.state_dict(); print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
