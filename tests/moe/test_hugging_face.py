"""Hugging Face models with converted experts equal their own, also with experts divided among ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn

import ds_moe
import ds_zero
from ds_moe.hugging_face import ConvertedExperts
from harness import ranks

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}),
    "Qwen2Moe": (
        "Qwen2Moe",
        {
            "num_experts": 4,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 8,
            "num_experts_per_tok": 3,
        },
    ),
    "Qwen3Moe": (
        "Qwen3Moe",
        {"num_experts": 4, "moe_intermediate_size": 12, "head_dim": 8, "num_experts_per_tok": 2},
    ),
    "DeepseekV3": (
        "DeepseekV3",
        {
            "n_routed_experts": 4,
            "moe_intermediate_size": 12,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": None,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
}


def made(name: str) -> nn.Module:
    prefix, own = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**SIZES, **own)
    model: nn.Module = getattr(transformers, f"{prefix}ForCausalLM")(config)
    return model.train()


def tokens(rank: int) -> torch.Tensor:
    return torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(rank))


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def test_losses_and_gradients_equal_transformers() -> None:
    for name in MODELS:
        model = made(name)
        converted = ds_moe.convert(copy.deepcopy(model))
        assert any(isinstance(m, ConvertedExperts) for m in converted.modules())
        assert converted.state_dict().keys() == model.state_dict().keys()
        losses = [loss_of(m, tokens(0)) for m in (model, converted)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
        for loss in losses:
            loss.backward()
        for (key, ours), theirs in zip(converted.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(
                ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
            )


@ranks(2, groups_may_stay=True, timeout_s=120)
def test_divided_experts_train_as_the_whole_model() -> None:
    for name, stage in (("Mixtral", 3), ("Qwen2Moe", 2), ("DeepseekV3", 1)):
        whole = made(name)
        model = ds_moe.convert(copy.deepcopy(whole), ep_size=2)
        mesh_for = ds_moe.expert_mesh(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True)
        ds_zero.shard(model, optimizer, stage, mesh_for=mesh_for)
        reference = torch.optim.AdamW(whole.parameters(), lr=0.01, foreach=True)
        for _ in range(2):
            loss = loss_of(model, tokens(dist.get_rank()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses = [loss_of(whole, tokens(rank)) for rank in range(2)]
            (sum(losses) / 2).backward()  # type: ignore[union-attr]
            reference.step()
            reference.zero_grad()
            assert loss.item() == pytest.approx(losses[dist.get_rank()].item(), rel=1e-5), name
        values = ds_zero.full_state_dict(model)
        if dist.get_rank() == 0:
            for key, value in whole.state_dict().items():
                torch.testing.assert_close(
                    values[key].float(), value.float(), rtol=1e-3, atol=2e-4, msg=f"{name} {key}"
                )
        [report, *_] = ds_moe.reports(model)
        assert sum(report.load) == 2 * 2 * 2 * 9 * (3 if name == "Qwen2Moe" else 2)


def test_models_that_cannot_be_converted_are_named() -> None:
    with pytest.raises(ValueError, match="Sequential: no module with stacked experts"):
        ds_moe.convert(nn.Sequential(nn.Linear(2, 2)))
    model = made("Mixtral")
    model.model.layers[1].mlp.experts.has_bias = True  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts: MixtralExperts.has_bias is True"):
        ds_moe.convert(model)
