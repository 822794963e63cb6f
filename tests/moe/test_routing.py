"""Routers against brute force: who is chosen, who is dropped, which weights, which losses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ds_moe
from ds_moe import RouterOptions, Routing, route
from ds_moe.routing.capacity import capacity_of
from ds_moe.routing.router import Router


def logits_of(seed: int, tokens: int, experts: int) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kept_by_brute_force(routing: Routing, scores: torch.Tensor, capacity: int, policy: str) -> torch.Tensor:
    """Expert by expert, choice by choice."""
    kept = torch.zeros_like(routing.experts, dtype=torch.bool)
    for expert in range(scores.shape[1]):
        tokens = (routing.experts == expert).nonzero().tolist()
        if policy == "position":
            tokens.sort(key=lambda tc: (tc[1], tc[0]))
        else:
            tokens.sort(key=lambda tc: -scores[tc[0], expert].item())
        for token, choice in tokens[:capacity]:
            kept[token, choice] = True
    return kept


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    tokens=st.integers(0, 20),
    experts=st.integers(1, 7),
    k=st.integers(1, 3),
    policy=st.sampled_from(["position", "probs"]),
    factor=st.sampled_from([0.3, 1.0, 1.3]),
)
def test_kept_tokens_are_those_of_brute_force(
    seed: int, tokens: int, experts: int, k: int, policy: str, factor: float
) -> None:
    """DS#7986: by probability, an expert keeps its best tokens, and nobody whom it was not chosen by."""
    k = min(k, experts)
    options = RouterOptions(
        num_experts=experts,
        k=k,
        drop=policy,
        capacity_factor=factor,
        min_capacity=1,
        normalize=False,  # type: ignore[arg-type]
    )
    logits = logits_of(seed, tokens, experts)
    routing = route(logits, options, training=True)
    probs = logits.softmax(-1)
    assert torch.equal(routing.experts, probs.topk(k, dim=-1).indices)
    capacity = capacity_of(tokens, experts, k, factor, 1)
    expected = kept_by_brute_force(routing, probs, capacity, policy)
    assert routing.kept is not None
    assert torch.equal(routing.kept, expected)
    assert torch.equal(routing.weights, probs.gather(1, routing.experts) * expected)
    assert routing.counts.sum() == tokens * k


def test_capacity() -> None:
    assert capacity_of(10, 4, 1, 1.0, 0) == 3
    assert capacity_of(10, 4, 2, 1.25, 0) == 7
    assert capacity_of(10, 4, 1, 1.0, 5) == 5
    assert capacity_of(0, 4, 1, 1.0, 0) == 0


def test_random_policy_keeps_other_tokens_each_time_and_as_many() -> None:
    options = RouterOptions(num_experts=2, drop="random", capacity_factor=0.5, min_capacity=1)
    logits = torch.tensor([[9.0, 0.0]] * 40)
    masks = [route(logits, options, training=True).kept for _ in range(2)]
    assert [int(m.sum()) for m in masks if m is not None] == [10, 10]
    assert not torch.equal(masks[0], masks[1])  # type: ignore[arg-type]
    evaluated = route(logits, options, training=False).kept
    assert evaluated is not None and evaluated[:20].all() and not evaluated[20:].any()


def test_weights_are_normalised_over_the_kept_choices() -> None:
    logits = logits_of(0, 6, 4)
    options = RouterOptions(
        num_experts=4, k=2, drop="position", capacity_factor=0.6, min_capacity=1, scale=2.5
    )
    routing = route(logits, options, training=True)
    assert routing.kept is not None and not routing.kept.all()
    sums = routing.weights.sum(1)
    torch.testing.assert_close(sums, 2.5 * routing.kept.any(1).to(sums))
    single = route(logits, RouterOptions(num_experts=4), training=True)
    torch.testing.assert_close(single.weights, logits.softmax(-1).max(-1, keepdim=True).values)


def test_deepseek_v3_groups_and_bias() -> None:
    options = RouterOptions(
        num_experts=6, k=2, score="sigmoid", num_groups=3, groups_per_token=1, bias_rate=0.1, scale=2.0
    )
    #                        group 0      group 1      group 2
    logits = torch.tensor([[3.0, -9.0, 1.0, 1.5, 0.0, 0.0]])
    routing = route(logits, options, training=True, bias=torch.zeros(6))
    assert routing.experts.tolist() == [
        [3, 2]
    ]  # group 1 has the best two together, though the best is in group 0
    scores = logits.sigmoid()[0]
    expected = 2.0 * torch.stack([scores[3], scores[2]]) / (scores[3] + scores[2])
    torch.testing.assert_close(routing.weights[0], expected)
    biased = route(logits, options, training=True, bias=torch.tensor([0.0, 0, 0, 0, 5, 5]))
    assert sorted(biased.experts[0].tolist()) == [4, 5]
    torch.testing.assert_close(biased.weights, torch.tensor([[1.0, 1.0]]))  # the bias is not in the weights


def test_losses() -> None:
    logits = logits_of(1, 50, 5).requires_grad_()
    options = RouterOptions(num_experts=5, k=2, z_loss=0.5)
    routing = route(logits, options, training=True)
    probs = logits.softmax(-1)
    chosen = torch.zeros(50, 5, dtype=torch.float64).scatter_(1, routing.experts, 1.0)
    balance = (probs.mean(0) * chosen.mean(0)).sum() * 5 / 2
    expected = balance + 0.5 * torch.logsumexp(logits, -1).square().mean()
    torch.testing.assert_close(routing.aux_loss, expected)
    [grad] = torch.autograd.grad(routing.aux_loss, logits)
    [expected_grad] = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(grad, expected_grad)
    uniform = torch.zeros(8, 4)
    spread = route(uniform, RouterOptions(num_experts=4, k=4), training=True)
    torch.testing.assert_close(spread.aux_loss, torch.tensor(1.0))
    torch.testing.assert_close(spread.entropy / 8, torch.tensor(math.log(4)))


def test_unused_tokens_take_no_room_and_get_no_weight() -> None:
    options = RouterOptions(num_experts=2, drop="position", capacity_factor=0.5, min_capacity=1)
    used = torch.tensor([False, False, True, True])
    routing = route(torch.tensor([[5.0, 0.0]] * 4), options, training=True, used=used)
    assert routing.kept is not None and routing.kept.flatten().tolist() == [False, False, True, False]
    assert routing.counts.tolist() == [2, 0]
    layer = ds_moe.MoE(4, ds_moe.FeedForward(4, 8), num_experts=2, drop_tokens=False)
    out, _, counts = layer(torch.randn(4, 4), used)
    assert counts.sum() == 2 and not out[:2].any() and out[2:].any()


def test_second_choice_and_rsample_are_samples_in_training_only() -> None:
    logits = torch.tensor([[5.0, 1.0, 1.0, 1.0]]).repeat(400, 1)
    second = RouterOptions(num_experts=4, k=2, sample_second=True)
    torch.manual_seed(0)
    routing = route(logits, second, training=True)
    assert (routing.experts[:, 0] == 0).all()
    assert torch.bincount(routing.experts[:, 1], minlength=4)[1:].min() > 90
    fixed = route(logits, second, training=False)
    assert (fixed.experts == fixed.experts[:1]).all()
    first = RouterOptions(num_experts=4, noise="rsample")
    shares = torch.bincount(route(logits * 0.2, first, training=True).experts.flatten(), minlength=4) / 400
    torch.testing.assert_close(shares, (logits[0] * 0.2).softmax(-1), atol=0.08, rtol=0)


def test_jitter_changes_the_scores_in_training_only() -> None:
    router = Router(4, RouterOptions(num_experts=3, noise="jitter"))
    x = torch.randn(5, 4)
    assert not torch.equal(router(x).weights, router(x).weights)
    router.eval()
    assert torch.equal(router(x).weights, router(x).weights)


def test_bias_balances_a_lopsided_router() -> None:
    torch.manual_seed(0)
    options = RouterOptions(num_experts=4, k=1, score="sigmoid", bias_rate=0.01)
    layer = ds_moe.MoELayer(6, lambda: ds_moe.FeedForward(6, 6), options)
    with torch.no_grad():
        layer.router.weight[0] += 0.5
    x = torch.randn(200, 6) + 0.5
    before = layer(x)[2]
    for _ in range(150):
        layer(x)
        ds_moe.update_biases(layer)
    after = layer(x)[2]
    assert before.max() > 120 and after.max() < 75
    assert layer.bfloat16().router.bias.dtype == torch.float32


def test_wrong_options_are_named() -> None:
    for options, message in (
        ({"num_experts": 0}, "num_experts=0"),
        ({"num_experts": 2, "k": 3}, "k=3: it must be from 1 to num_experts=2"),
        ({"num_experts": 4, "num_groups": 3}, "num_groups=3 must divide"),
        ({"num_experts": 4, "num_groups": 4, "k": 2}, "have only 1 experts"),
        ({"num_experts": 4, "drop": "last"}, "drop='last': it must be one of 'none'"),
        ({"num_experts": 4, "capacity_factor": 0.0}, "drop='none'"),
        ({"num_experts": 4, "sample_second": True}, "needs k=2"),
        ({"num_experts": 4, "k": 2, "noise": "rsample"}, "needs k=1"),
    ):
        with pytest.raises(ValueError, match=message):
            RouterOptions(**options)  # type: ignore[arg-type]
