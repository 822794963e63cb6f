"""Grouped experts against the loop, in every layout, and which modules can be stacked."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional

import ds_moe
from ds_moe.dispatch.plan import Layout, layout, permutation, segment_index
from ds_moe.experts.grouped_linear import grouped_linear, reference_linear
from ds_moe.experts.stack import LoopedExperts, StackedExperts, make_experts, why_not_stacked


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(5, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.a(x).chunk(2, dim=-1)
        return self.b(torch.sigmoid(gate) * up)  # type: ignore[no-any-return]


class AcrossRows(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - x.mean(0)


class ReadsWeights(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.a.weight)[:, :6]


def test_layouts_give_the_products_of_each_expert() -> None:
    """Values and gradients; experts without rows get zeros."""
    for sizes in ([3, 0, 5], [0, 0, 0], [1, 1, 1], [0, 9, 0]):
        for padded in (0, max(sizes) + 1):
            for with_bias in (True, False):
                groups = Layout(sizes, padded)
                x = torch.randn(groups.num_rows, 4, dtype=torch.float64, requires_grad=True)
                weight = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
                bias = torch.randn(3, 6, dtype=torch.float64, requires_grad=True) if with_bias else None
                tensors = [t for t in (x, weight, bias) if t is not None]
                results = []
                for product in (grouped_linear, reference_linear):
                    out = product(x, weight, bias, groups)
                    results.append((out, *torch.autograd.grad(out.sin().sum(), tensors)))
                torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_stacked_experts_equal_the_loop(dtype: torch.dtype) -> None:
    sources: list[object] = [
        lambda: ds_moe.FeedForward(6, 12),
        lambda: ds_moe.FeedForward(6, 12, gated=True, activation="silu", bias=False),
        lambda: nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 6)),
        Gated,
    ]
    for source in sources:
        for sizes in ([4, 0, 7, 1], [40, 0, 0, 1], [0, 0, 0, 0]):
            both = []
            for method in ("grouped", "loop"):
                torch.manual_seed(1)
                experts = make_experts(source, 4, range(4), method).to(dtype)  # type: ignore[arg-type]
                rows = torch.randn(sum(sizes), 6, generator=torch.Generator().manual_seed(2)).to(dtype)
                rows.requires_grad_()
                out = experts(rows, sizes)
                out.float().square().sum().backward()
                grads = [p.grad for p in experts.parameters()]
                if isinstance(
                    experts, LoopedExperts
                ):  # in the order of experts; parameters of one after another
                    count = len(grads) // 4
                    grads = [torch.stack(grads[i::count]) for i in range(count)]  # type: ignore[arg-type]
                both.append((out, rows.grad, *grads))
            bound = 1e-12 if dtype == torch.float64 else 0.05
            torch.testing.assert_close(both[0], both[1], rtol=bound, atol=bound)


def test_padding_is_bounded_by_the_rows() -> None:
    assert layout([8] * 32, 32, "cpu") == Layout([8] * 32, 8)
    lopsided = [0] * 31 + [256]
    assert layout(lopsided, 32, "cpu").num_rows == 256
    assert layout([9, 7], 4096, "cpu").padded == 0
    assert layout([8] * 32, 32, "cuda").padded == 0


def test_which_modules_can_be_stacked() -> None:
    def problem(module: nn.Module) -> str:
        return why_not_stacked(module) or ""

    assert not problem(Gated())
    assert "depends on other rows" in problem(AcrossRows())
    assert "does not work with stacked weights" in problem(ReadsWeights())
    assert "'1.weight' does not belong to an nn.Linear" in problem(
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    )
    assert "no nn.Linear" in problem(nn.ReLU())
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert "share a parameter" in problem(tied)
    with pytest.raises(ValueError, match="experts_by='grouped', but experts AcrossRows cannot be stacked"):
        ds_moe.MoE(6, AcrossRows(), num_experts=2, experts_by="grouped")
    layer = ds_moe.MoE(6, AcrossRows(), num_experts=2, drop_tokens=False)
    assert isinstance(layer.experts, LoopedExperts)
    layer(torch.randn(4, 6))[0].sum().backward()


def test_trying_leaves_no_trace() -> None:
    torch.manual_seed(0)
    first = torch.rand(1)
    torch.manual_seed(0)
    expert = nn.Sequential(Gated(), nn.Dropout(0.5))
    torch.manual_seed(0)
    assert why_not_stacked(expert) is None
    assert torch.equal(torch.rand(1), first) and expert.training and expert[1].training


def test_copies_and_made_experts() -> None:
    """A module is copied, as in DeepSpeed; a function makes every expert, and only this rank's are kept."""
    copies = make_experts(ds_moe.FeedForward(4, 8), 3, range(3), "auto")
    assert isinstance(copies, StackedExperts)
    for param in copies.parameters():
        assert torch.equal(param[0], param[2])
    wholes, parts = [], []
    for into, local in ((wholes, range(4)), (parts, range(2, 4))):
        torch.manual_seed(5)
        made = make_experts(lambda: ds_moe.FeedForward(4, 8), 4, local, "auto")
        into += [p.detach() for p in made.parameters()]
        into.append(torch.rand(1))
    for whole, part in zip(wholes[:-1], parts[:-1], strict=True):
        assert torch.equal(whole[2:], part)
    assert torch.equal(wholes[-1], parts[-1])


def test_frozen_experts_and_dtype_stay() -> None:
    expert = ds_moe.FeedForward(4, 8).bfloat16()
    expert.up.requires_grad_(False)
    made = make_experts(expert, 2, range(2), "auto")
    kinds = {n: (p.dtype, p.requires_grad) for n, p in made.named_parameters()}
    assert kinds["expert.up.weight"] == (torch.bfloat16, False)
    assert kinds["expert.down.weight"] == (torch.bfloat16, True)


def test_permutation_has_no_tensor_of_tokens_times_experts() -> None:
    experts = torch.tensor([[2, 0], [0, 1], [2, 1]])
    kept = torch.tensor([[True, True], [False, True], [True, True]])
    plan = permutation(experts, kept, 3)
    assert plan.token.tolist() == [0, 1, 2, 0, 2] and plan.sizes == [1, 2, 2]
    assert plan.row.tolist() == [[3, 0], [5, 1], [4, 2]]
    #            rank 0: 1 row for expert 0, 2 for expert 1; rank 1: 3 and 0
    assert segment_index([[1, 2], [3, 0]], torch.device("cpu")).tolist() == [0, 4, 5, 1, 2, 3]


def test_gradients_by_finite_differences() -> None:
    torch.manual_seed(0)
    layer = ds_moe.MoE(
        5,
        lambda: ds_moe.FeedForward(5, 6),
        num_experts=3,
        k=2,
        capacity_factor=0.7,
        min_capacity=1,
        top2_2nd_expert_sampling=False,
    ).double()
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: layer(v)[0], (x,))


def test_autocast_and_activation_checkpointing() -> None:
    torch.manual_seed(0)
    layer = ds_moe.MoE(8, lambda: ds_moe.FeedForward(8, 16), num_experts=4, k=2, drop_tokens=False).eval()
    x = torch.randn(3, 5, 8, requires_grad=True)
    out = layer(x)[0]
    out.sum().backward()
    grad, x.grad = x.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)[0]
    assert low.dtype == torch.float32 and not torch.equal(low, out)
    torch.testing.assert_close(low, out, rtol=0.1, atol=0.02)
    again = torch.utils.checkpoint.checkpoint(lambda v: layer(v)[0], x, use_reentrant=False)
    again.sum().backward()  # type: ignore[union-attr]
    assert torch.equal(x.grad, grad)  # type: ignore[arg-type]


def test_residual_and_shared_experts() -> None:
    torch.manual_seed(0)
    layer = ds_moe.MoE(8, ds_moe.FeedForward(8, 16), num_experts=2, drop_tokens=False, use_residual=True)
    x = torch.randn(6, 8)
    out, _, _ = layer(x)
    share = layer.coefficient(x).softmax(-1)  # type: ignore[misc]
    dense = layer.residual(x)  # type: ignore[misc]
    # All experts are copies of the dense one, so the routed output is its output times the router's weight.
    weights = layer.router(x).weights
    torch.testing.assert_close(out, dense * weights * share[:, :1] + dense * share[:, 1:])
    shared = ds_moe.FeedForward(8, 16)
    extras = ds_moe.Extras(shared_expert=shared)
    options = ds_moe.RouterOptions(num_experts=2)
    torch.manual_seed(1)
    with_shared = ds_moe.MoELayer(8, ds_moe.FeedForward(8, 16), options, extras=extras)
    torch.manual_seed(1)
    without = ds_moe.MoELayer(8, ds_moe.FeedForward(8, 16), options)
    torch.testing.assert_close(with_shared(x)[0], without(x)[0] + shared(x))


def test_wrong_arguments_are_named() -> None:
    expert = ds_moe.FeedForward(4, 8)
    with pytest.raises(ValueError, match="the input has 5 features, but hidden_size=4"):
        ds_moe.MoE(4, expert, num_experts=2)(torch.randn(2, 5))
    with pytest.raises(ValueError, match="used_token has 3 elements for 2 tokens"):
        ds_moe.MoE(4, expert, num_experts=2)(torch.randn(2, 4), torch.ones(3))
    with pytest.raises(ValueError, match="noisy_gate_policy='jitter'"):
        ds_moe.MoE(4, expert, num_experts=2, noisy_gate_policy="jitter")
    with pytest.warns(UserWarning, match="use_tutel has no effect"):
        ds_moe.MoE(4, expert, num_experts=2, use_tutel=True)
    # "call torch.distributed.init_process_group()" follows where an earlier test of this process has not called it.
    with pytest.raises(ValueError, match="ep_size=2 must divide the 1 ranks of the job"):
        ds_moe.MoE(4, expert, num_experts=2, ep_size=2)
