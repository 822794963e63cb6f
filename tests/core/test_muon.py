"""Muon: torch's own as the oracle, groups, fused steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_core.optim import Muon, muon_groups
from ds_core.optim.muon import orthogonalize


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(7, 12), (12, 7), (5, 5)]]


def give_grads(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


@pytest.mark.parametrize("nesterov", [True, False])
def test_matrices_move_as_with_torch(nesterov: bool) -> None:
    ours, theirs = matrices(), matrices()
    a = Muon(ours, lr=0.02, weight_decay=0.1, nesterov=nesterov)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, nesterov=nesterov)
    for step in range(5):
        for params, optimizer in ((ours, a), (theirs, b)):
            give_grads(params, step)
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


def test_orthogonalize_brings_singular_values_near_one() -> None:
    matrix = torch.randn(20, 33, generator=torch.Generator().manual_seed(1))
    for found in (orthogonalize(matrix, dtype=torch.float32), orthogonalize(matrix.T, dtype=torch.float32).T):
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.5
        assert values.max() < 1.5
        # the singular vectors stay: found^T matrix is symmetric
        product = found @ matrix.T
        torch.testing.assert_close(product, product.T, rtol=1e-3, atol=1e-3)


def test_parameters_without_groups_are_divided_by_shape() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(16, 5))
    optimizer = Muon(model.parameters(), lr=0.02, adam_lr=0.5)
    assert [(g["use_muon"], g["lr"], len(g["params"])) for g in optimizer.param_groups] == [
        (True, 0.02, 2),
        (False, 0.5, 2),
    ]
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(1, 3, 3, 3)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_the_rest_moves_as_with_adamw() -> None:
    ours, theirs = nn.Parameter(torch.ones(9)), nn.Parameter(torch.ones(9))
    a = Muon(
        [{"params": [ours], "use_muon": False}], adam_lr=0.1, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8
    )
    b = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8)
    for step in range(4):
        for param, optimizer in ((ours, a), (theirs, b)):
            give_grads([param], step)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_groups_by_name() -> None:
    model = nn.ModuleDict(
        {"embed_tokens": nn.Embedding(5, 4), "up": nn.Linear(4, 4), "lm_head": nn.Linear(4, 5)}
    )
    model["up"].bias.requires_grad_(False)
    groups = muon_groups(model.named_parameters())
    assert groups[0] == {"params": [model["up"].weight], "use_muon": True}
    assert {id(p) for p in groups[1]["params"]} == {
        id(model["embed_tokens"].weight),
        *(id(p) for p in model["lm_head"].parameters()),
    }
    assert not groups[1]["use_muon"]


def test_a_fused_step_scales_and_copies_out() -> None:
    one, two = matrices(), matrices()
    a, b = Muon(one, lr=0.02), Muon(two, lr=0.02)
    give_grads(one, 3)
    give_grads(two, 3)
    for param in one:
        assert param.grad is not None
        param.grad.mul_(4.0)
    out = [torch.empty_like(p, dtype=torch.bfloat16) for p in one]
    a.step_fused(one, grad_scale=torch.tensor(0.25), out=out)
    b.step()
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))
    assert all(torch.equal(copy, p.bfloat16()) for copy, p in zip(out, one, strict=True))


def test_state_survives_a_round_trip() -> None:
    params = matrices()
    optimizer = Muon(params)
    give_grads(params, 0)
    optimizer.step()
    other = Muon(matrices())
    other.load_state_dict(optimizer.state_dict())
    buffers = [next(iter(o.state.values()))["momentum_buffer"] for o in (optimizer, other)]
    assert torch.equal(*buffers)


def test_vectors_cannot_be_orthogonal() -> None:
    with pytest.raises(
        ValueError, match=r"param_groups\[0\] has use_muon=True and a parameter of shape \(3,\)"
    ):
        Muon([{"params": [nn.Parameter(torch.ones(3))], "use_muon": True}])
    with pytest.raises(ValueError, match="momentum must not be negative"):
        Muon(matrices(), momentum=-1.0)
