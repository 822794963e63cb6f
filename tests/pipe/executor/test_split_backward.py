"""Backward in two parts: the same bits, each gradient computed once, and the cases that it refuses."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ds_pipe.executor import Stage


class Attention(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.inner = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


class TwoOutputs(nn.Module):
    """One output depends on no input; one parameter is behind a function of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.scale = nn.Linear(8, 8), nn.Parameter(torch.rand(8))
        self.alone = nn.Parameter(torch.rand(3))
        self.unused = nn.Parameter(torch.rand(1))

    def forward(self, x):
        return self.a(x) * self.scale.exp().sqrt(), self.alone * 2


MODELS = {
    "mlp": lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8, bias=False)),
    "encoder": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
    "attention": Attention,
    "two outputs": TwoOutputs,
    "convolution": lambda: nn.Sequential(nn.Conv1d(5, 6, 3), nn.BatchNorm1d(6), nn.Flatten(1)),
}


def gradients_of(stage: Stage, split: bool, x: torch.Tensor):
    stage.module.zero_grad()
    output = stage.forward(0, x.requires_grad_())
    outputs = output if isinstance(output, tuple) else (output,)
    torch.manual_seed(1)
    given = [torch.randn_like(t) for t in outputs]
    if split:
        inputs = stage.backward_input(0, given)
        before = [p.grad for p in stage.parameters()]
        assert stage.split_refusal or not any(g is not None for g in before)
        stage.backward_weight(0)
    else:
        inputs = stage.backward(0, given)
    assert stage.num_kept == 0
    return inputs, [None if p.grad is None else p.grad.clone() for p in stage.parameters()]


@pytest.mark.parametrize("name", MODELS)
def test_gradients_have_the_same_bits(name):
    torch.manual_seed(0)
    stage = Stage(MODELS[name](), 1)
    x = torch.randn(4, 5, 8)
    for ours, theirs in zip(gradients_of(stage, True, x), gradients_of(stage, False, x), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)
    assert not stage.split_refusal


class Products(TorchDispatchMode):
    """Notes the matrix products that run."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.shapes.append([tuple(a.shape) for a in args])
        return func(*args, **(kwargs or {}))


def test_nothing_is_computed_twice():
    torch.manual_seed(0)
    stage, x = Stage(MODELS["mlp"](), 1), torch.randn(4, 5, 8)
    counts = []
    for split in (True, False):
        with Products() as products:
            gradients_of(stage, split, x)
        counts.append(sorted(products.shapes))
    assert counts[0] == counts[1] and len(counts[0]) == 6


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8, 8))

    def forward(self, x):
        return torch.tanh(x @ self.weight) @ self.weight


class Recomputed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=True)


@pytest.mark.parametrize("module", [Tied, Recomputed])
def test_what_cannot_be_split_is_computed_whole_and_says_so(module):
    torch.manual_seed(0)
    stage, x = Stage(module(), 3), torch.randn(4, 8)
    with pytest.warns(UserWarning, match="stage 3: backward is not split"):
        ours = gradients_of(stage, True, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it says so once
        gradients_of(stage, True, x)
    for a, b in zip(ours, gradients_of(stage, False, x), strict=True):
        assert all(torch.equal(g, h) for g, h in zip(a, b, strict=True))
