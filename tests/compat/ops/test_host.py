"""The optimizers of deepspeed.ops that step on the host, used by themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from torch import nn

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", [DeepSpeedCPUAdam, FusedAdam])
def test_parameters_of_16_bits_are_stepped_in_fp32(dtype: torch.dtype, kind: type) -> None:
    torch.manual_seed(0)
    half = [nn.Parameter(torch.randn(33).to(dtype)), nn.Parameter(torch.randn(5, 3))]
    master = [nn.Parameter(p.detach().float()) for p in half]
    optimizer, reference = kind(half, lr=1e-2), torch.optim.AdamW(master, lr=1e-2, weight_decay=0.0)
    for _ in range(5):
        for p, m in zip(half, master, strict=True):
            p.grad = torch.randn_like(p)
            m.data.copy_(p)  # rounded after every step, as a parameter of 16 bits is
            m.grad = p.grad.float()
        optimizer.step()
        reference.step()
    assert half[0].dtype == dtype and optimizer.state[half[0]]["exp_avg"].dtype == torch.float32
    for p, m in zip(half, master, strict=True):
        assert torch.allclose(p.float(), m.detach().to(p.dtype).float(), rtol=1e-2, atol=1e-6)
        assert torch.allclose(optimizer.state[p]["exp_avg"], reference.state[m]["exp_avg"], atol=1e-6)
        assert int(optimizer.state[p]["step"]) == 5


def test_moments_of_bf16_on_request() -> None:
    param = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = DeepSpeedCPUAdam([param], fp32_optimizer_states=False)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.state[param]["exp_avg_sq"].dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{}, {"adamw_mode": False}, {"bias_correction": False}])
def test_a_subgroup_is_stepped_as_a_parameter_is_and_rolled_back(options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(50))
    twin = nn.Parameter(param.detach().clone())
    optimizer = DeepSpeedCPUAdam([param], lr=1e-2, weight_decay=0.1, **options)
    plain = DeepSpeedCPUAdam([twin], lr=1e-2, weight_decay=0.1, **options)
    before = []
    for _ in range(3):
        param.grad = twin.grad = torch.randn(50)
        before.append((param.detach().clone(), copy.deepcopy(optimizer.state.get(7)), param.grad))
        optimizer.step_subgroup(7)
        plain.step()
        assert torch.equal(param, twin)
    for step in (2, 1, 0):
        value, state, param.grad = before[step]
        optimizer.rollback_subgroup(7)
        assert optimizer.state[7]["step"] == step
        assert torch.allclose(param, value, atol=1e-4)
        for name in ("exp_avg", "exp_avg_sq"):
            expected = state[name] if state is not None else torch.zeros(50)
            assert torch.allclose(optimizer.state[7][name], expected, atol=1e-6)
    with pytest.raises(RuntimeError, match="step count is 0"):
        optimizer.rollback_subgroup(7)
    with pytest.raises(RuntimeError, match="step_subgroup\\(1\\) was not called"):
        optimizer.rollback_subgroup(1)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    optimizer.param_groups[1]["params"][0].grad = torch.ones(1)
    with pytest.raises(ValueError, match="have 2 parameters with a gradient"):
        optimizer.step_subgroup(7)


def test_sparse_gradients_of_adagrad() -> None:
    torch.manual_seed(0)
    mine, theirs = nn.Embedding(20, 4, sparse=True), nn.Embedding(20, 4)
    theirs.load_state_dict(mine.state_dict())
    optimizer = DeepSpeedCPUAdagrad(mine.parameters(), lr=0.1)
    reference = torch.optim.Adagrad(theirs.parameters(), lr=0.1)
    for step in range(3):
        for table in (mine, theirs):
            table.weight.grad = None
            table(torch.tensor([1, step, 5, 1])).square().sum().backward()
        optimizer.step()
        reference.step()
        assert mine.weight.grad is not None and mine.weight.grad.is_sparse
    assert torch.allclose(mine.weight, theirs.weight, atol=1e-6)
    decaying = DeepSpeedCPUAdagrad(mine.parameters(), lr=0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"weight_decay 0\.1 with sparse gradients"):
        decaying.step()
