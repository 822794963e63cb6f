"""Cross entropy of a linear layer without all logits: the loss and gradients of torch, in less memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ds_layers import linear_cross_entropy, tiled_over_sequence


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes that torch had allocated at a time while `function` ran, above those before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    level = peak = 0
    for _, size in sorted(sizes, key=lambda item: item[0]):
        level += size
        peak = max(peak, level)
    return peak


@pytest.mark.parametrize("bias", [False, True])
def test_losses_and_gradients_are_torchs(bias: bool) -> None:
    torch.manual_seed(0)
    head = nn.Linear(8, 21, bias=bias)
    hidden = torch.randn(2, 7, 8, requires_grad=True)
    labels = torch.randint(0, 21, (2, 7))
    labels[0, 2:5] = -100
    inputs = [hidden, *head.parameters()]

    def torchs(reduction: str) -> Tensor:
        return cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction=reduction)

    for reduction in ("mean", "sum"):
        want = torchs(reduction)
        expected = torch.autograd.grad(want * 3, inputs)
        for part in (1, 4, 100):
            got = linear_cross_entropy(
                hidden,
                head.weight,
                labels,
                head.bias,
                part_tokens=part,
                reduction=reduction,  # type: ignore[arg-type]
            )
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(torch.autograd.grad(got * 3, inputs), expected, atol=1e-6, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low = linear_cross_entropy(hidden, head.weight, labels, head.bias, part_tokens=4)
        torch.testing.assert_close(
            torch.autograd.grad(low, inputs), torch.autograd.grad(torchs("mean"), inputs), atol=0.02, rtol=0.1
        )
    none = linear_cross_entropy(hidden, head.weight, torch.full_like(labels, -100))
    assert none.item() == 0 and not torch.autograd.grad(none, [hidden])[0].any()
    head.weight.requires_grad_(False)
    frozen = torch.autograd.grad(linear_cross_entropy(hidden, head.weight, labels, part_tokens=3), [hidden])
    assert frozen[0].shape == hidden.shape
    with pytest.raises(ValueError, match=r"weight \(21, 8\), labels \(2, 6\)"):
        linear_cross_entropy(hidden, head.weight, labels[:, :6])
    with pytest.raises(ValueError, match="part_tokens is 0"):
        linear_cross_entropy(hidden, head.weight, labels, part_tokens=0)


def test_the_logits_never_exist_together() -> None:
    tokens, features, vocabulary = 2048, 32, 1000
    head = nn.Linear(features, vocabulary, bias=False)
    hidden = torch.randn(tokens, features, requires_grad=True)
    labels = torch.randint(0, vocabulary, (tokens,))
    logits = 4 * tokens * vocabulary
    plain = peak_bytes(lambda: cross_entropy(head(hidden), labels).backward())
    head.weight.grad = hidden.grad = None
    tiled = peak_bytes(lambda: linear_cross_entropy(hidden, head.weight, labels, part_tokens=64).backward())
    kept = 2 * 4 * (tokens * features + vocabulary * features)  # gradients, and their scaled copies
    assert plain > 2 * logits
    assert tiled <= kept + 3 * logits * 64 // tokens + 2**16


def test_a_tiled_mlp_keeps_the_activations_of_one_tile() -> None:
    mlp = nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 16))
    x = torch.randn(1, 4096, 16, requires_grad=True)
    inner = 4 * 4096 * 256
    plain = peak_bytes(lambda: mlp(x).sum().backward())
    for parameter in (x, *mlp.parameters()):
        parameter.grad = None
    tiled = peak_bytes(lambda: tiled_over_sequence(mlp, x, 16).sum().backward())
    assert plain > 2 * inner
    assert tiled < 0.6 * inner, (plain, tiled, inner)
