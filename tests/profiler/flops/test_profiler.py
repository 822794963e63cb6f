"""Counts are those of formulas written down by hand, and each belongs to the right module."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ds_profiler import FlopsProfiler, Work, profile_model, text
from ds_profiler.flops import products


class Attention(nn.Module):
    """The same attention, written in several ways."""

    def __init__(self, heads, size, how):
        super().__init__()
        self.heads, self.how = heads, how
        self.qkv = nn.Linear(heads * size, 3 * heads * size)
        self.out = nn.Linear(heads * size, heads * size)

    def forward(self, x):
        b, t, e = x.shape
        q, k, v = (p.view(b, t, self.heads, -1).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        if self.how == "fused":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.how == "keywords":
            y = F.scaled_dot_product_attention(query=q, key=k, value=v)
        elif self.how == "operator":
            y = ((q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        else:
            scores = torch.einsum("bhid,bhjd->bhij", q, k)
            y = torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)
        return self.out(y.transpose(1, 2).reshape(b, t, e))


def by_name(profile):
    return {module.name: module for _, module in profile.model.walk()}


@pytest.mark.parametrize("how", ["fused", "keywords", "operator", "einsum"])
@pytest.mark.parametrize("inference", [False, True])
def test_attention_counts_the_same_however_it_is_written(how, inference):
    b, t, h, d = 2, 16, 4, 8
    model = Attention(h, d, how)
    with torch.inference_mode(inference):
        profile = profile_model(model, [torch.randn(b, t, h * d)])
    e = h * d
    assert profile.forward.macs == b * t * (3 * e * e + e * e) + 2 * b * h * t * t * d
    assert by_name(profile)["qkv"].forward.macs == b * t * 3 * e * e


def test_grouped_query_attention_on_a_cpu():
    q, k, v = torch.randn(2, 8, 16, 4), torch.randn(2, 2, 16, 4), torch.randn(2, 2, 16, 4)

    class Grouped(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    assert profile_model(Grouped(), [q, k, v]).forward.macs == 2 * 2 * 8 * 16 * 16 * 4


def test_backward_belongs_to_its_modules():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Sequential(nn.Linear(16, 4)))
    x = torch.randn(5, 8)
    with FlopsProfiler(model) as profiler:
        F.mse_loss(model(x), torch.zeros(5, 4)).backward()
    modules = by_name(profiler.profile())
    # The gradient of the weights, and of the input where it is needed.
    assert modules["0"].backward.macs == 5 * 8 * 16
    assert modules["2.0"].backward.macs == 2 * 5 * 16 * 4
    assert modules["2"].backward == modules["2.0"].backward
    assert modules["1"].backward.flops == 5 * 16
    assert profiler.profile().outside_forward.flops > 0  # the loss
    assert modules["0"].backward_s > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_forward_is_told_apart(reentrant):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again = (
                nn.Linear(8, 8),
                nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)),
            )

        def forward(self, x):
            return checkpoint(self.again, self.first(x), use_reentrant=reentrant)

    model = Model()
    with FlopsProfiler(model) as profiler:
        model(torch.randn(4, 8)).sum().backward()
    profile = profiler.profile()
    modules = by_name(profile)
    # torch stops a recomputation when it has all that it saved: the last product is not among it, unless reentrant.
    again = 4 * 8 * 32 * (2 if reentrant else 1)
    assert profile.model.recomputed.macs == again
    assert modules["again.0"].recomputed.macs == 4 * 8 * 32
    assert modules["again.0"].backward.macs == modules["again.2"].backward.macs == 2 * 4 * 8 * 32
    assert modules["first"].recomputed == Work()
    assert modules["again"].calls == 1


def test_accumulates_over_micro_batches_and_goes_on_after_a_stop():
    model = nn.Linear(4, 4)
    profiler = FlopsProfiler(model)
    for _ in range(3):
        with profiler:
            model(torch.randn(2, 4)).sum().backward()
        model(torch.randn(2, 4))  # not recorded
    assert profiler.profile().forwards == 3
    assert profiler.profile().forward.macs == 3 * 2 * 16
    profiler.reset()
    assert profiler.profile().total == Work()


def test_nothing_stays_on_the_model_also_after_a_failure():
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("no")

    model = nn.Sequential(nn.Linear(4, 4), Fails())
    with pytest.raises(RuntimeError, match="no"), FlopsProfiler(model):
        model(torch.randn(2, 4))
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_model_that_recorded_half_a_forward():
    """Recording may begin inside of a forward, as when a hook starts it."""

    class Starts(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Linear(4, 4)
            self.profiler = None

        def forward(self, x):
            if self.profiler is not None:
                self.profiler.start()
            return self.part(x)

    model = Starts()
    model.profiler = FlopsProfiler(model)
    model(torch.randn(2, 4))
    model.profiler.stop()
    assert model.profiler.profile().forward.macs == 2 * 16


def test_shared_modules_and_tied_parameters_are_counted_once_each():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight
            self.block = nn.Linear(4, 4, bias=False)
            self.same = self.block

        def forward(self, x):
            return self.head(self.same(self.block(self.embed(x))))

    profile = profile_model(Tied(), [torch.arange(10)])
    assert profile.model.params == 40 + 16
    modules = by_name(profile)
    assert modules["block"].calls == 2
    assert modules["block"].forward.macs == 2 * 10 * 16
    assert "same" not in modules


def test_operations_of_your_own():
    with torch.library._scoped_library("ds_profiler_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")

        class Own(nn.Module):
            def forward(self, x):
                return torch.ops.ds_profiler_test.twice(x)

        profile = profile_model(Own(), [torch.ones(7)])
        assert profile.unknown == {"ds_profiler_test::twice": 1}
        assert "ds_profiler_test::twice (1 calls)" in text(profile)
        formula = {"ds_profiler_test::twice": lambda args, kwargs, out: products(out.numel())}
        profile = profile_model(Own(), [torch.ones(7)], formulas=formula)
        assert (profile.forward.macs, dict(profile.unknown)) == (7, {})


def test_tokens_that_a_router_sends_are_what_counts():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))

        def forward(self, x, to):
            return torch.cat([expert(x[to == i]) for i, expert in enumerate(self.experts)])

    profile = profile_model(Experts(), [torch.randn(9, 4), torch.tensor([0] * 7 + [2] * 2)])
    modules = by_name(profile)
    assert [modules[f"experts.{i}"].forward.macs for i in range(3)] == [7 * 16, 0, 2 * 16]
    # Its forward is never called.
    assert modules["experts"].forward_s == pytest.approx(
        sum(modules[f"experts.{i}"].forward_s for i in range(3))
    )


def test_other_layers_against_formulas():
    conv = profile_model(nn.Conv2d(3, 8, 3, padding=1, groups=1), [torch.randn(2, 3, 10, 10)])
    assert conv.forward.macs == 2 * 8 * 100 * 3 * 9
    grouped = profile_model(nn.Conv1d(4, 8, 3, groups=2), [torch.randn(1, 4, 12)])
    assert grouped.forward.macs == 8 * 10 * 2 * 3
    lstm = profile_model(nn.LSTM(5, 7, num_layers=2), [torch.randn(6, 3, 5)])
    assert lstm.forward.macs == 6 * 3 * 4 * 7 * (5 + 7 + 7 + 7)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    for frozen in (False, True):  # without gradients torch has one fused operation for the whole layer
        with torch.set_grad_enabled(not frozen):
            encoder = profile_model(layer, [torch.randn(2, 6, 16)])
        assert encoder.forward.macs == 2 * 6 * (4 * 16 * 16 + 2 * 6 * 16 + 2 * 16 * 32)
    pool = profile_model(nn.MaxPool2d(2), [torch.randn(1, 1, 4, 4)])
    assert pool.forward == Work(0, 16)


def test_compiled_models_are_seen():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    compiled = torch.compile(model, backend="eager")
    compiled(torch.randn(2, 4))
    profile = profile_model(compiled, [torch.randn(2, 4)], warm_up=0)
    assert profile.forward.macs == 2 * 2 * 32
    assert any(m.forward.macs == 2 * 32 for m in by_name(profile).values())


def test_report_and_json():
    model = nn.Sequential(nn.Linear(1000, 1000), nn.Sequential(nn.Linear(1000, 10)))
    with FlopsProfiler(model) as profiler:
        model(torch.randn(3, 1000)).sum().backward()
    profile = profiler.profile()
    report = text(profile, top=2)
    assert "1.01 M" in report
    assert "3.03 MMACs" in report
    assert "(0): Linear(in_features=1000, out_features=1000, bias=True)" in report
    assert "depth 2:" in report
    one = text(profile, depth=1, detailed=False)
    assert "depth 1:" in one
    assert "depth 0:" not in one
    assert "All modules" not in one
    restored = json.load(io.StringIO(json.dumps(profile.as_dict())))
    assert restored["model"]["children"][1]["children"][0]["forward_macs"] == 3 * 1000 * 10
    with pytest.raises(ValueError, match="top=0"):
        text(profile, top=0)
    with pytest.raises(ValueError, match="generate"):
        profile_model(model, mode="generate")


def test_ignored_classes_belong_to_the_module_around_them():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    profile = profile_model(model, [torch.randn(2, 4)], ignore=[nn.Linear])
    assert set(by_name(profile)) == {"", "0", "0.1"}
    assert by_name(profile)["0"].forward.macs == 2 * 16
