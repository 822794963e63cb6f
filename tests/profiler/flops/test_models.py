"""MACs and parameters of whole models are those of the formulas in papers and textbooks, forward and backward."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from ds_profiler import FlopsProfiler, profile_model

B, T = 2, 32


def forward(model, **inputs):
    return profile_model(model.eval(), kwargs=inputs, warm_up=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gpt2(attention):
    config = transformers.GPT2Config(
        n_layer=3, n_embd=48, n_head=4, vocab_size=100, n_positions=T, attn_implementation=attention
    )
    profile = forward(transformers.GPT2LMHeadModel(config), input_ids=torch.randint(100, (B, T)))
    e = 48
    assert profile.forward.macs == B * T * (3 * (12 * e * e + 2 * T * e) + e * 100)
    assert profile.model.params == 100 * e + T * e + 3 * (12 * e * e + 13 * e) + 2 * e
    # What is no product is below one percent in a model of usual width; here it is more.
    assert profile.forward.flops < 2.3 * profile.forward.macs


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_llama_with_grouped_queries_forward_and_backward(attention):
    e, f, h, kv = 64, 96, 8, 2
    config = transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=e,
        intermediate_size=f,
        num_attention_heads=h,
        num_key_value_heads=kv,
        vocab_size=120,
        attn_implementation=attention,
    )
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(120, (B, T))
    with FlopsProfiler(model) as profiler:
        model(input_ids=ids, labels=ids).loss.backward()
    profile = profiler.profile()
    projections = 2 * e * e + 2 * e * e * kv // h + 3 * e * f
    rotary = profile.forward.macs - B * T * (2 * (projections + 2 * T * e) + e * 120)
    assert 0 <= rotary <= 0.001 * profile.forward.macs  # positions times frequencies, as a product
    # Each product twice, for weights and inputs; the fused attention computes its scores again.
    again = B * T * 2 * T * e if attention == "sdpa" else 0
    assert profile.backward.macs == 2 * (profile.forward.macs - rotary) + again
    if attention == "sdpa":
        assert "LlamaMLP" in {m.kind for _, m in profile.model.walk()}


def test_t5():
    d, inner, f, h = 32, 4 * 8, 64, 4
    config = transformers.T5Config(
        d_model=d, d_kv=8, d_ff=f, num_layers=2, num_decoder_layers=3, num_heads=h, vocab_size=50
    )
    t_in, t_out = 24, 8
    profile = forward(
        transformers.T5ForConditionalGeneration(config),
        input_ids=torch.randint(50, (B, t_in)),
        decoder_input_ids=torch.randint(50, (B, t_out)),
    )
    encoder = t_in * (4 * d * inner + 2 * t_in * inner + 2 * d * f)
    crossing = t_out * 2 * d * inner + t_in * 2 * d * inner + 2 * t_out * t_in * inner
    decoder = t_out * (4 * d * inner + 2 * t_out * inner + 2 * d * f) + crossing
    assert profile.forward.macs == B * (2 * encoder + 3 * decoder + t_out * d * 50)


def test_mixtral_counts_the_experts_that_a_token_uses():
    e, f, h, kv, experts, k = 64, 96, 4, 2, 8, 2
    config = transformers.MixtralConfig(
        num_hidden_layers=2,
        hidden_size=e,
        intermediate_size=f,
        num_attention_heads=h,
        num_key_value_heads=kv,
        num_local_experts=experts,
        num_experts_per_tok=k,
        vocab_size=80,
    )
    profile = forward(transformers.MixtralForCausalLM(config), input_ids=torch.randint(80, (B, T)))
    layer = 2 * e * e + 2 * e * e * kv // h + 2 * T * e + e * experts + k * 3 * e * f
    expected = B * T * (2 * layer + e * 80)
    assert expected <= profile.forward.macs <= 1.001 * expected


class Bottleneck(nn.Module):
    """The block of ResNet-50 (He et al., arXiv 1512.03385)."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.narrow = nn.Sequential(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.middle = nn.Sequential(
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.widen = nn.Sequential(nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width))
        self.across = (
            nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
            if stride != 1 or inputs != 4 * width
            else nn.Identity()
        )

    def forward(self, x):
        return torch.relu(self.widen(self.middle(self.narrow(x))) + self.across(x))


def test_resnet_50():
    layers, inputs = (
        [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)],
        64,
    )
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for index in range(blocks):
            layers.append(Bottleneck(inputs, width, stride if index == 0 else 1))
            inputs = 4 * width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))
    profile = profile_model(model.eval(), [torch.randn(1, 3, 224, 224)], warm_up=0)
    # 4.09 billion multiply-accumulates and 25.557 million parameters are the published figures.
    assert profile.forward.macs == pytest.approx(4.09e9, rel=0.005)
    assert profile.model.params == 25_557_032
    assert profile.forward.flops == pytest.approx(2 * profile.forward.macs, rel=0.02)
